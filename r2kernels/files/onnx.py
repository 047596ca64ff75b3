"""ONNX: weights as integers or look-up tables, and inputs of layers through QuantizeLinear and DequantizeLinear.

A recorded model has a node of the domain `DOMAIN` in the place of each: `weight_node` and `input_node` put them there,
and `expand` makes standard operators of them.
"""

import torch

from .clustered import along_channels, assembled, is_turned
from .integers import integer_weight
from .uniform import Uniform

OPSET = 21  # the first with 4-bit integers, and with 16-bit codes for DequantizeLinear
DOMAIN = "r2kernels"


def check_installed():
    """ImportError that says how to install what writing ONNX needs."""
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('format "onnx" needs onnx and onnxscript: pip install "r2kernels[onnx]"') from error


def weight_node(name, w):
    """Stands for a weight like w in a graph that torch.onnx.export records."""
    return _node("weight", (), name, w)


def input_node(name, x):
    """Stands for the quantized x."""
    return _node("input", (x,), name, x)


def _node(kind, inputs, name, like):
    made = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"name": name}, dtype=like.dtype, shape=like.shape, version=1
    )
    return made if made.device == like.device else made.to(like.device)  # it is made on the CPU


def expand(model, weights, inputs):
    """Puts the operators of weights and inputs in the places of their nodes, in an onnx_ir model.

    weights: name -> `Uniform` or `Clustered`; inputs: name -> (`IntegerInput`, name of the layer's weight).
    """
    from onnx_ir import convenience

    made = {}
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        name, (output,) = node.attributes["name"].as_string(), node.outputs
        maker = _Maker(model.graph, f"{name}:input" if node.op_type == "input" else name)
        if node.op_type == "input":
            levels, weight = inputs[name]
            value = maker.quantized(node.inputs[0], output.dtype, levels, _has_kernel(levels, weights.get(weight)))
        elif name in made:
            value = made[name]
        else:
            value = made[name] = maker.weight(weights[name])
        value.shape, value.type = output.shape, output.type
        convenience.replace_nodes_and_values(model.graph, node, [node], maker.tape.nodes, [output], [value])
    model.opset_imports.pop(DOMAIN, None)


def _float(number):
    return torch.tensor(number, dtype=torch.float32, device="cpu")


def _has_kernel(levels, weight):
    """Whether runtimes may compute a layer with these inputs and this weight in integers."""
    return isinstance(weight, Uniform) and weight.form.bits == levels.bits == 8


class _Maker:
    """Makes the operators in the place of one node, and their initializers, `name:part`."""

    def __init__(self, graph, name):
        import onnx_ir
        from onnx_ir.tape import Tape

        self.ir, self.graph, self.name, self.tape = onnx_ir, graph, name, Tape()

    def op(self, kind, *inputs, **attributes):
        return self.tape.op(kind, inputs, attributes)

    def constant(self, part, values, dtype=None):
        """A tensor as an initializer; `dtype` is that of onnx_ir, where torch has none like it."""
        from onnx_ir.tensor_adapters import TorchTensor

        name = f"{self.name}:{part}"
        if name not in self.graph.initializers:
            values = values.detach().cpu().contiguous().resolve_neg()
            stored = TorchTensor(values, name) if dtype is None else self._as(values, dtype, name)
            kind = self.ir.TensorType(stored.dtype)
            self.graph.initializers[name] = self.ir.Value(name=name, shape=stored.shape, type=kind, const_value=stored)
        return self.graph.initializers[name]

    def _as(self, values, dtype, name):
        return self.ir.tensor(values.numpy().astype(dtype.numpy()), dtype, name)

    def cast(self, value, dtype, to):
        """The value, of this dtype, in another one of torch's or onnx_ir's."""
        dtype, to = (self._dtype(d) for d in (dtype, to))
        return value if dtype == to else self.op("Cast", value, to=to)

    def _dtype(self, dtype):
        from onnx_ir.tensor_adapters import from_torch_dtype

        return from_torch_dtype(dtype) if isinstance(dtype, torch.dtype) else dtype

    def small(self, codes):
        """The dtype of 4 bits that holds codes, or None."""
        kinds = self.ir.DataType
        low, high = codes.min().item(), codes.max().item()
        if codes.dtype == torch.uint8:
            return kinds.UINT4 if high <= 15 else None
        return kinds.INT4 if low >= -8 and high <= 7 else None

    def weight(self, stored):
        return self.dequantized(stored) if isinstance(stored, Uniform) else self.looked_up(stored)

    def dequantized(self, uniform):
        """Codes and DequantizeLinear, of groups in blocks along the numbers of a channel."""
        w, shape, form = integer_weight(uniform), uniform.shape, uniform.form
        codes, zero, scale, placed = w.codes, w.zero_point, w.scale.float(), {"axis": w.axis}
        each = form.each(shape) if w.group_size else 1
        if each > 1:
            codes = codes.movedim(w.axis, 0).flatten(1)
            zero, scale = zero.reshape(-1, each), scale.reshape(-1, each)
            placed = {"axis": 1, "block_size": w.group_size}
        elif w.axis is None:
            zero, scale, placed = zero[0], scale[0], {}
        kind = self.small(codes)
        values = [self.constant("codes", codes, kind), self.constant("scale", scale)]
        if zero.any():
            values.append(self.constant("zero_point", zero, kind))
        y = self.cast(self.op("DequantizeLinear", *values, **placed), torch.float32, uniform.dtype)
        return self._from_rows(y, shape, w.axis) if each > 1 else y

    def _from_rows(self, y, shape, axis):
        """A weight of this shape of its channels, (C, numbers of each)."""
        others = [i for i in range(len(shape)) if i != axis]
        if len(shape) > 2:
            y = self.op("Reshape", y, self._shape("shape", [shape[axis], *(shape[i] for i in others)]))
        order = [others.index(i) + 1 if i != axis else 0 for i in range(len(shape))]
        return self.op("Transpose", y, perm=order) if axis else y

    def quantized(self, x, dtype, levels, has_kernel):
        """x on its levels, by codes of uint8: int8 is turned into it by onnxruntime, which then fails on some graphs.

        QuantizeLinear clips to a whole byte; without a kernel, a Clip of the result clips to the levels. It also stands
        between DequantizeLinear and the layer: next to it onnxruntime rounds float weights to 8 bits and the bias to a
        multiple of scale_x scale_w, which with palettes, or fewer bits than its kernels have, would cost more than the
        quantization (0.026 in outputs of about 1, measured at 4 bits).
        """
        middle = 128 if levels.signed else 0
        zero = self.constant("zero_point", torch.tensor(levels.zero_point + middle, dtype=torch.uint8, device="cpu"))
        step, offset = _float(levels.scale), levels.offset and self.constant("offset", _float(levels.offset))
        x, scale = self.cast(x, dtype, torch.float32), self.constant("scale", step)
        x = self.op("Sub", x, offset) if levels.offset else x
        if levels.signed and levels.bits == 1:
            codes = self._signs(x, middle)
        else:
            codes = self.op("QuantizeLinear", x, scale, zero)
        y = self.op("DequantizeLinear", codes, scale, zero)
        if not has_kernel:
            low, high = (step * (code - levels.zero_point) for code in levels.range())
            y = self.op("Clip", y, self.constant("low", low), self.constant("high", high))
        return self.cast(self.op("Add", y, offset) if levels.offset else y, torch.float32, dtype)

    def _signs(self, x, middle):
        """The codes -1 below 0 and else 1, as uint8 around `middle`."""
        below, above = (
            self.constant(part, torch.tensor(middle + code, dtype=torch.uint8, device="cpu"))
            for part, code in (("below", -1), ("above", 1))
        )
        return self.op("Where", self.op("Less", x, self.constant("threshold", _float(0.0))), below, above)

    def looked_up(self, clustered):
        """Codes and Gather: of one table of all groups, so the codes of a group come after those before it."""
        shape, axis = clustered.form.channels_first(clustered.shape), clustered.form.axis
        c = clustered.unpacked()._replace(shape=shape, form=clustered.form._replace(axis=0))
        single = c.form.cluster_dim == 1
        c = _by_rows(c) if single and len(c.geometry.blocks) > 1 else c
        table = self._table(c)
        w = self._gathered(c, table) if single else self._rows(c, table)
        if c.scales is not None:
            w = self.op("Mul", w, self.constant("scale", along_channels(c.scales, len(c.shape))))
        return self.op("Transpose", w, perm=[1, 0, *range(2, len(shape))]) if axis else w

    def _table(self, c):
        """(groups K,) numbers of the weight's dtype, or (groups K, d)."""
        shape = [-1] if c.form.cluster_dim == 1 else [-1, c.form.cluster_dim]
        if c.entries.dtype != torch.int8:
            entries = c.entries if c.lut_scales is None else c.luts()
            return self.cast(self.constant("lut", entries.reshape(shape)), entries.dtype, c.dtype)
        lut, scale = (
            self.constant("lut", c.entries.flatten(1)),
            self.constant("lut_scale", c.lut_scales.float().flatten()),
        )
        table = self.op("Reshape", self.op("DequantizeLinear", lut, scale, axis=0), self._shape("lut_shape", shape))
        return self.cast(table, torch.float32, c.dtype)

    def _shape(self, part, shape):
        return self.constant(part, torch.tensor(shape, device="cpu"))

    def _index(self, part, codes, firsts):
        """Indices into the table of all groups: of codes, and what the groups that they are in add to these."""
        index = self.op("Cast", self.constant(part, codes, self.small(codes)), to=self.ir.DataType.INT32)
        for j, first in enumerate(firsts):
            index = self.op("Add", index, self.constant(f"{part}_first{j or ''}", first.int()))
        return index

    def _gathered(self, c, table):
        """The numbers of a weight of single weights, of which each adds what its tile says to its code."""
        g, firsts, step = c.geometry, [], 2**c.form.bits
        view = g.view if g.blocks[0].counts[0] < g.groups else c.shape
        for i in reversed(range(len(g.view))):
            tile = g.blocks[0].tile[i]
            if g.view[i] > tile:
                first = torch.arange(g.view[i], device=c.codes.device) // tile * step
                firsts.append(along_channels(first, len(view), i))
            step *= -(-g.view[i] // tile)
        codes = assembled(c.codes, c.leftovers, c.shape, c.form).reshape(view)
        w = self.op("Gather", table, self._index("codes", codes, firsts), axis=0)
        return w if view == c.shape else self.op("Reshape", w, self._shape("shape", list(c.shape)))

    def _rows(self, c, table):
        parts, done, over = [], 0, 0
        for j, b in enumerate(c.geometry.blocks):
            firsts, count, size = [], b.count, b.each * c.form.cluster_dim
            if b.counts[0] < count:
                raise ValueError(
                    f"{self.name} has tiles {c.form.granularity} of rows of {c.form.cluster_dim}; "
                    "an ONNX file holds tiles of single weights alone"
                )
            if c.geometry.groups > 1:
                firsts = [(b.first + torch.arange(count, device=c.codes.device)[:, None]) * 2**c.form.bits]
            codes = c.codes[done : done + count * b.each].reshape(count, b.each)
            rows = self.op("Gather", table, self._index(f"codes{j}", codes, firsts), axis=0)
            w = self.op("Reshape", rows, self._shape(f"flat{j}", [count, size]))
            if b.left:
                left = c.leftovers[over : over + count * b.left].reshape(count, b.left)
                w = self.op("Concat", w, self.constant(f"leftovers{j}", left), axis=1)
            if is_turned(c.shape, c.form.cluster_dim, c.form.layout):
                turned = [count, c.shape[-1], *c.shape[1:-1], b.tile[0]]
                order = list(range(len(turned)))
                order[1], order[-1] = order[-1], order[1]
                w = self.op("Transpose", self.op("Reshape", w, self._shape(f"turned{j}", turned)), perm=order)
            parts.append(self.op("Reshape", w, self._shape(f"shape{j}", [count * b.tile[0], *c.shape[1:]])))
            done, over = done + count * b.each, over + count * b.left
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)


def _by_rows(c):
    """With the tables of tiles in the order of their rows and, in these, columns."""
    g = c.geometry
    numbers = torch.arange(g.groups, device=c.codes.device)
    sizes = [torch.full((b.count,), b.each, device=c.codes.device) for b in g.blocks]
    placed = assembled(numbers.repeat_interleave(torch.cat(sizes)), c.leftovers.long(), c.shape, c.form)
    order = placed.reshape(g.view)[tuple(slice(None, None, tile) for tile in g.blocks[0].tile)].flatten()
    scales = c.lut_scales if c.lut_scales is None or len(c.lut_scales) == 1 else c.lut_scales[order]
    return c._replace(entries=c.entries[order], lut_scales=scales)
