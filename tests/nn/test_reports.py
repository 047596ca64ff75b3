"""What users of such tools reported in public, and the tests that replay it."""

import re
from pathlib import Path

import pytest
import torch
from nn.attached import images
from nn.quantized import plain
from torch.nn.functional import cross_entropy

from r2kernels import Palettizer, Quantizer
from r2kernels.nn import attached

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parents[1]
REPLAYED = {
    "sparseml#1465, #1113: an averaged copy is stale": "nn/test_copies.py::test_averaged_models",
    "distiller#185, #21, Lightning#6457: resume": "nn/test_copies.py::test_a_quantizer_that_is_a_part_of_its_model",
    "nncf#1337, pytorch#41179, #167063: ONNX while attached": "nn/test_tracing.py::test_onnx_exporters",
    "pytorch#29657, nncf#235: a module used twice": "nn/test_starting.py::test_a_start_sees_all_calls_of_a_module",
    "pytorch#54816, aimet#789, MQBench#113: transposed": "nn/test_calibrate_options.py::test_the_axis_of_each_layer",
    "MQBench#57: weight_norm": "nn/test_coverage.py::test_computed_weights",
    "Lightning#8677, #15862: training_step": "nn/test_entries.py::test_forward_without_hooks_and_a_step_of_a_trainer",
    "ao#198, pytorch#120983, axolotl#2590: switch off and on": "nn/test_starting.py::test_enable",
    "ao#198, axolotl#2590: start later": "nn/test_starting.py::test_delay_and_observe",
    "aimet#220, #1424, auto-round#300: exclude, mixed bits": "nn/test_calibrate_options.py::test_overrides",
    "brevitas#309, #1306: integers": "nn/test_export.py::test_integers_are_the_hard_weights_bit_for_bit",
    "brevitas#425, HGQ2#11: zero weights": "nn/test_starting.py::test_a_layer_of_zeros_trains",
    "pytorch#33648, #38081, #85627: ranks": (
        "nn/test_quantizer.py::test_two_processes_agree_where_one_alone_reaches_a_layer"
    ),
    "pytorch#33648, #38081, #85627: unused": "distributed/ddp.py::check_layers_that_some_ranks_do_not_use",
    "pytorch#33648, #38081, #85627: sharded": "distributed/fsdp.py::check_ranges_start_in_the_first_forward",
    "aimet#1974, nncf#88: batch norm": "nn/test_batchnorm.py::test_of_a_quantized_model",
    "AutoGPTQ#520, sparseml#1950: progress": "nn/test_batches.py::test_a_bar",
    "quanto#101, ao#4518: group-wise scales": "nn/test_groups.py::test_training_saving_and_loading",
    "bitsandbytes#1849, ModelOpt#1173, transformers#24504: skipped": "nn/test_coverage.py::test_language_models",
    "model-optimization#520, #702: pruned zeros": "nn/test_palettizer_clusters.py::test_pruned_weights_stay_pruned",
    "coremltools#2777: channel scales": "nn/test_palettizer_clusters.py::test_a_channel_of_zeros_stays_zero",
    "ml-stable-diffusion#246: inf": "nn/test_palettizer_clusters.py::test_a_weight_that_is_not_finite_is_refused",
    "peft#2571, adapters#663: LoRA": "nn/test_palettizer_models.py::test_lora_leaves_zero",
    "pytorch#81296, transformers#43203: reentrant": (
        "nn/test_entries.py::test_every_kind_of_checkpointing_gives_the_same_gradients"
    ),
    "vllm#38336, mlx-vlm#1464, AutoAWQ#47: shards in low memory": "files/test_found.py::test_shards_one_at_a_time",
    "vllm#38336, mlx-vlm#1464, AutoAWQ#47: shards are written": "cli/test_found.py::test_transformers_save_and_load",
    "coremltools#2602, #2551, any4#3: many groups": "kmeans/test_lists.py::test_groups_of_a_list_are_as_they_are_alone",
    "SqueezeLLM#67, Anemll#29: weights": "nn/test_sensitivity.py::test_a_weighted_start_has_less_weighted_error",
    "coremltools#2090, #2546: finer tables": "files/test_tiles.py::test_three_bits_and_an_eighth",
    "coremltools#2316: activations": "nn/test_entries.py::test_palettes_with_quantized_activations",
}


@pytest.mark.parametrize("report", REPLAYED)
def test_every_report_has_its_test(report):
    path, _, name = REPLAYED[report].partition("::")
    assert re.search(rf"^def {name}\(", (TESTS / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("attach", [lambda m: Palettizer(m, 2), lambda m: Quantizer(m, "lsq", 4, 4)])
def test_moved_after_an_evaluation(attach, dtype):
    """bitsandbytes#937: what is learned keeps its precision, also as a part of a model that is converted."""
    model, (x, y) = plain(), images()
    model.owner = attach(model)
    before = {name: t.dtype for name, t in model.owner.state_dict().items()}
    cross_entropy(model[:5](x), y).backward()
    model[:5].eval()(x)
    model.to(dtype).train()
    assert before == {name: t.dtype for name, t in model.owner.state_dict().items()}
    assert attached(model) == [model.owner]
    model.zero_grad()
    out = model[:5](x.to(dtype))
    assert out.dtype == dtype
    cross_entropy(out.float(), y).backward()
    assert all(p.grad.dtype == dtype for p in model[:5].parameters())
