"""torch's default device and dtype: every tensor that the package makes names its own, so nothing depends on them."""

import ast
import contextlib
import copy
import inspect
from pathlib import Path

import pytest
import torch
from nn.attached import images
from torch import nn
from torch.utils._device import _device_constructors

import r2kernels as r2
from r2kernels import cli, lists
from r2kernels.cli import demo
from r2kernels.files.coreml import to_coreml
from r2kernels.nn import copy_attached, reestimate_batchnorm
from r2kernels.reference import parameters

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = Path(r2.__file__).parent
FACTORIES = {f.__name__ for f in _device_constructors()}
UNTYPED = {"empty", "empty_strided", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}


def unnamed(call):
    """What a call of `torch.` or `nn.` that makes tensors leaves to a default."""
    owner = getattr(call.func, "value", None)
    if not isinstance(owner, ast.Name) or owner.id not in ("torch", "nn"):
        return set()
    name, module = call.func.attr, getattr(nn, call.func.attr, None)
    placed = inspect.isclass(module) and "device" in inspect.signature(module).parameters
    needed = {"device"} if name in FACTORIES or placed else set()
    needed |= {"dtype"} if name in UNTYPED or placed else set()
    given = {keyword.arg for keyword in call.keywords}
    return needed - given - ({"device", "dtype"} if ast.unparse(call).endswith("**HOST)") else set())


def unnamed_in(source):
    return [
        (node.lineno, unnamed(node))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        if unnamed(node)
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_factories_name_their_device(path):
    assert unnamed_in(path.read_text()) == []


def test_the_walk_sees_factories():
    both = {"device", "dtype"}
    source = "torch.zeros(3)\ntorch.tensor(1, device=d)\nnn.Linear(2, 2)\nnn.ReLU()\nx.new_zeros(3)\ntorch.arange(3)"
    assert unnamed_in(source) == [(1, both), (3, both), (6, {"device"})]


@contextlib.contextmanager
def default(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


DEFAULTS = {
    "set_default_device": lambda: default(torch.set_default_device, "meta", None),
    "with torch.device": lambda: torch.device("meta"),
    "float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
}


class Given:
    """Models and tensors, made before a default changes."""

    def __init__(self, device, folder):
        g = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.device, self.folder = device, folder
        net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
        self.net, self.x = net.to(device), images()[0].to(device)
        self.ws = [torch.randn(s, generator=g).to(device).requires_grad_() for s in ((19, 3, 2), (131,), (4, 6))]
        self.half = [torch.randn(70000, generator=g).half().to(device).requires_grad_()]
        self.wide = [w.detach().double().requires_grad_() for w in self.ws]
        self.checkpoint = folder / "model.pt"
        torch.save(self.net.cpu().state_dict(), self.checkpoint)
        self.net.to(device)

    def model(self):
        return copy.deepcopy(self.net)


def differentiated(function, *several, given=(), **options):
    """Results of lists, and their gradients."""
    found = []
    for ws in several:
        results = flat(function(ws, *given, **options))
        loss = sum(((i + 1) * t).sum() for i, t in enumerate(results) if t.requires_grad)
        found += [*results, *torch.autograd.grad(loss, ws)]
    return found


def losses(given):
    calls = {
        "l_inf": {},
        "margin": {"M": 0.31, "k": 0.17},
        "soft_min_max": {"alpha": 1.31},
        "soft_extrema": {"alpha": 2.17},
        "kure": {"target": 1.71},
        "bin_reg": {"step": 0.33, "bits": 3},
        "msqe": {"step": 0.37, "bits": 3},
        "partial_l2": {"fraction": 0.43},
    }
    terms = {name: options for name, options in calls.items() if name != "soft_extrema"}
    for layer in (r2, r2.reference):
        for name, options in calls.items():
            yield differentiated(getattr(layer, name), given.ws, given.half, given.wide, **options)
        yield differentiated(layer.weight_terms, given.ws, given.wide, terms=terms)
        yield layer.weight_stats(given.ws)[:6]


def quantizers(given):
    for layer in (r2, r2.reference):
        for axis in (None, 0):
            yield differentiated(layer.lsq, given.ws, given.half, step=0.29, bits=4, axis=axis)
        yield differentiated(layer.ewgs, given.ws, given.half, lower=-1.1, upper=1.3, bits=4, delta=0.11)
        yield differentiated(layer.pact, given.ws, given.half, alpha=1.37, bits=4, plus=True)
        for bits in (1, 4):
            yield differentiated(layer.dorefa, given.ws, given.half, bits=bits)


def clustering(given):
    for layer in (r2, r2.reference):
        centroids = layer.kmeans(given.ws, 4)
        yield centroids, layer.assign(given.ws, centroids), layer.kmeans(given.half[0], 5, preserve_zeros=True)
        pairs = layer.kmeans(given.ws, 3, cluster_dim=2)
        yield pairs, layer.assign(given.ws, pairs, cluster_dim=2)
        for options in ({}, {"gradient": "implicit"}, {"metric": "sqeuclidean"}, {"iterations": "converge"}):
            yield differentiated(layer.dkm, given.ws, given=(centroids, 0.23), **options)
        yield differentiated(layer.dkm, given.ws, given=(pairs, 0.23), cluster_dim=2, iterations="converge")
    yield differentiated(r2.dkm, given.half, given=(r2.kmeans(given.half, 4), 0.23))


def regularizers(given):
    for options in ({}, {"loss": "margin"}, {"loss": "kure"}, {"alpha": 3.0, "alpha_unit": "std", "learn": False}):
        model = given.model()
        regularizer = r2.RangeRegularizer(model, **options)
        loss = regularizer()
        loss.backward()
        yield loss, regularizer.accumulate_grad_(), [p.grad for p in model.parameters() if p.grad is not None]


def trained(given, model, owner):
    model.train()
    loss = model(given.x).square().sum()
    loss.backward()
    yield loss, [p.grad for p in [*model.parameters(), *owner.parameters()]], owner.state_dict()
    model.eval()
    yield model(given.x)


def written(given, save, owner):
    for entropy in (None, "huffman"):
        save(owner, given.folder / "w.safetensors", entropy=entropy)
        yield r2.load_palettized(given.folder / "w.safetensors"), repr(r2.load_ranges(given.folder / "w.safetensors"))


def palettizers(given):
    for options in ({}, {"cluster_dim": 2, "per_channel_scale": True, "lut_dtype": "int8"}):
        model = given.model()
        palettizer = r2.Palettizer(model, 2, **options)
        yield from trained(given, model, palettizer)
        palettizer.step()
        yield palettizer.state_dict(), list(palettizer.sizes().values()), palettizer.gap()
        yield [to_coreml(name, c) for name, c in palettizer.clustered().items()]
        yield from written(given, r2.save_palettized, palettizer)
        twin = copy.deepcopy(model)
        copy_attached(model, twin, decay=0.5)
        yield twin(given.x)
        palettizer.remove()


def attached_quantizers(given):
    for method, bits in (("lsq", 4), ("ewgs", 3), ("pact", 2)):
        model = given.model()
        quantizer = r2.Quantizer(model, method, bits, 4)
        yield from trained(given, model, quantizer)
        yield quantizer.errors(), [tuple(w)[:3] for w in quantizer.export().weights.values()]
        yield from written(given, r2.save_quantized, quantizer)
        quantizer.remove()
    model = given.model().train()
    quantizer = r2.Quantizer(model, "ewgs", 3, 4, overrides={"*": {"delta": "hessian"}})
    quantizer.initialize(given.x)
    quantizer.estimate_delta(lambda: model(given.x).square().mean(), probes=1)
    yield quantizer.state_dict()


def calibrated(given):
    for options in (
        {},
        {"symmetric": False},
        {"method": "percentile"},
        {"group_size": 2},
        {"group_size": 2, "symmetric": False},
        {"method": "minmax", "axis": None},
    ):
        model = given.model()
        quantizer = r2.calibrate(
            model, [given.x[:4], given.x[4:]], 8, None if "group_size" in options else 8, **options
        )
        yield quantizer.state_dict(), model.eval()(given.x)
        state = quantizer.state_dict()
        yield r2.Quantizer.from_state(given.model(), state).state_dict()
    reestimate_batchnorm(model, [given.x])
    yield model.state_dict()


def exported(given):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = given.model().eval(), given.folder / "m.onnx"
    palettizer = r2.Palettizer(model, 2, cluster_dim=2, group_size=4, exclude="0")
    quantizer = r2.calibrate(model, [given.x], 4, 4, symmetric=False, exclude="4")
    r2.export([palettizer, quantizer], path, "onnx", (given.x,))
    session = onnxruntime.InferenceSession(path)
    yield torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.x.cpu().numpy()})[0])


def commands(given):
    small, again = str(given.folder / "small.safetensors"), str(given.folder / "again.pt")
    yield cli.main(["info", "--json"]), cli.main(["report", str(given.checkpoint), "--json"])
    yield cli.main(["report", str(given.checkpoint), "--sizes"])
    plot = ["--plot", str(given.folder / "w.png")]
    for line in (["compress", "--bits", "2"], ["quantize", "--bits", "4", "--asymmetric", *plot]):
        yield cli.main([line[0], str(given.checkpoint), "-o", small, "--force", *line[1:]])
        yield cli.main(["expand", small, "-o", again, "--force"]), torch.load(again)


def demonstrated(given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN", demo.BATCH)
        some = [t[: demo.TRAIN + 8] for t in demo.load_images(given.device)]
        model, regularizer, split = demo.train(demo.CASES[3], 0, 1, *some, lambda steps: None)
        yield model.state_dict(), demo.measure(model, regularizer, split, *some).ranges


PARTS = (
    losses,
    quantizers,
    clustering,
    regularizers,
    palettizers,
    attached_quantizers,
    calibrated,
    exported,
    commands,
    demonstrated,
)


def flat(found):
    """The tensors and numbers of what a part gave, in order."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [leaf for part in found for leaf in flat(part)]
    return [found]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
    return a == b


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_results_do_not_depend_on_defaults(part, device, tmp_path, capsys):
    """To the bit. What is remembered between calls is forgotten first: it would be made before."""
    given, expected = Given(device, tmp_path), None
    for name, changed in {"none": contextlib.nullcontext, **DEFAULTS}.items():
        for remembered in (lists._plan, lists._column_plan, lists._resident):
            remembered.cache_clear()
        parameters._constants.clear()
        torch.manual_seed(2)
        with changed():
            found = flat(list(part(given)))
        found.append(capsys.readouterr().out)
        expected = expected or found
        assert len(found) == len(expected)
        assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not same(a, b)] == [], name


def test_a_coefficient_follows_the_default_device():
    """As any module that is given no tensor does."""
    with torch.device("meta"):
        assert r2.LearnableCoefficient(0.5).omega.device.type == "meta"
    with default(torch.set_default_dtype, torch.float64, torch.float32):
        assert r2.LearnableCoefficient(0.5).omega.dtype == torch.float32


def test_what_is_attached_lies_where_the_weights_do(device):
    model = nn.Sequential(nn.Linear(8, 8)).to(device)
    assert {t.device.type for t in r2.Palettizer(model, 2).state_dict().values()} == {device}
