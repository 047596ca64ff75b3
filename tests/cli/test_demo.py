"""The demo, shortened to an epoch.

What it measures is checked against the definitions, not against hoped-for accuracies.
"""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from r2kernels import RangeRegularizer, cli
from r2kernels.backends import serving
from r2kernels.cli import demo, demo_results
from r2kernels.cli.console import number


@pytest.fixture(scope="module", autouse=True)
def two_palettes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PALETTES", ((2, 1), (4, 4)))
        patch.setattr(demo, "PALETTE_EPOCHS", 1)
        yield


@pytest.fixture(scope="module")
def short(two_palettes):
    """(result of one epoch, how far the progress went)."""
    done = []
    return demo.run(seeds=1, epochs=1, device="cpu", advance=done.append), sum(done)


def text(result):
    shown = io.StringIO()
    console = Console(width=200, file=shown)
    for part in demo_results.tables(result):
        console.print(part)
    return shown.getvalue()


def test_every_case_is_trained_and_measured(short):
    result, done = short
    assert done == demo.steps(1, 1) == 150
    assert result.layers[0] == "stem"
    assert result.layers[-1] == "head"
    assert len(result.layers) == 10
    for case in demo.CASES:
        (one,) = result.trained[case.name]
        assert list(one.accuracy) == [32, 4, 3, 2]
        assert all(0 <= value <= 1 for value in one.accuracy.values())
        weights = result.weights[case.name]
        assert one.ranges == [(w.max() - w.min()).item() for w in weights]
        assert one.stds == pytest.approx([w.std().item() for w in weights])


def test_the_losses_act(short):
    result, _ = short
    plain, *others = (sum(result.trained[case.name][0].ranges) for case in demo.CASES)
    assert all(other < plain for other in others[:3])
    assert all(other != plain for other in others)


def test_only_learned_parameters_move(short):
    parameters = {case.name: short[0].trained[case.name][0].parameter for case in demo.CASES}
    assert parameters["no R2"] is parameters["L-infinity"] is parameters["soft-min-max, alpha 8/std"] is None
    assert all(value > 0.1 for value in parameters["soft-min-max, alpha learned"])
    assert len(parameters["margin, top 1 %"]) == 10


def test_a_run_repeats_itself_and_leaves_the_global_state(short, monkeypatch):
    monkeypatch.setattr(demo, "CASES", demo.CASES[:2])
    torch.manual_seed(7)
    threads, expected = torch.get_num_threads(), torch.rand(3)
    torch.manual_seed(7)
    again = demo.run(seeds=1, epochs=1, device="cpu")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert again.trained == {case.name: short[0].trained[case.name] for case in demo.CASES}


def test_rounding():
    w = torch.tensor([-1.0, -0.4, 0.1, 0.9, 2.0])
    assert demo.round_min_max(w, 2).tolist() == [-1, 0, 0, 1, 2]
    assert demo.round_min_max(w, 1).tolist() == [-1, -1, -1, 2, 2]
    assert demo.round_min_max(torch.randn(1000), 3).unique().numel() == 8


@pytest.mark.parametrize("case", demo.CASES[1:], ids=lambda case: case.name)
def test_the_eager_loss_is_the_regularizer(case):
    torch.manual_seed(0)
    model = demo.network()
    regularizer = RangeRegularizer(model, **case.options)
    eager = regularizer.weight * demo.eager_loss(regularizer, list(demo.weight_matrices(model).values()))
    assert eager.item() == pytest.approx(regularizer().item(), rel=1e-5)


def test_no_speed_where_the_gradients_differ(monkeypatch):
    model = demo.network()
    original = demo.eager_loss
    monkeypatch.setattr(demo, "eager_loss", lambda *args: 1.01 * original(*args))
    with pytest.raises(RuntimeError, match="fused gradient differs from the eager one"):
        demo._speed(RangeRegularizer(model, "l_inf"), model)


def test_the_tables_hold_the_numbers_of_the_run(short):
    result, _ = short
    shown = text(result)
    assert number(result.trained["no R2"][0].ranges[3]) in shown
    assert number(sum(result.trained["L-infinity"][0].ranges) / 10) in shown
    assert f"{result.trained['margin, top 1 %'][0].accuracy[2]:.3f}" in shown
    assert f"backend {serving(torch.device('cpu'))}" in shown
    assert "1 seed, 1 epoch" in shown


def test_every_model_is_clustered(short):
    """Two bits a weight, then one: 1/16 and 1/32 of the float32 bytes, and the tables of ten layers."""
    count = sum(w.numel() for w in short[0].weights["no R2"])
    for case in demo.CASES:
        for (bits, d), one in zip(demo.PALETTES, short[0].clustered[case.name], strict=True):
            tables = 10 * 2**bits * d * 4
            assert one.dense == 4 * count
            assert one.packed == pytest.approx(count * bits / d / 8 + tables, rel=0.02, abs=10)
            assert tables < one.coded <= one.packed + 10
            assert 0 <= one.accuracy <= 1
    assert f"{short[0].clustered['no R2'][1].packed / 1e3:.1f}" in text(short[0])


def test_several_seeds_give_the_mean(short):
    one = short[0].trained["no R2"][0]
    other = one._replace(ranges=[3 * value for value in one.ranges], accuracy={bits: 0.5 for bits in demo.BITS})
    result = short[0]._replace(trained={**short[0].trained, "no R2": [one, other]})
    assert demo_results.mean_accuracy(result, "no R2", 2) == (one.accuracy[2] + 0.5) / 2
    assert number(2 * one.ranges[0]) in text(result)


def test_the_verdict_names_what_missed(short):
    def trained(values):
        return {
            case.name: [short[0].trained[case.name][0]._replace(accuracy={2: value})]
            for case, value in zip(demo.CASES, values, strict=True)
        }

    good = demo_results.verdict(short[0]._replace(trained=trained([0.5, 0.9, 0.95, 0.97, 0.6])))
    assert good == "2 bit: 0.500 without R2, 0.600 to 0.970 with"
    bad = demo_results.verdict(short[0]._replace(trained=trained([0.5, 0.9, 0.5, 0.97, 0.4])))
    assert bad == (
        "2 bit: 0.500 without R2, 0.400 to 0.970 with; "
        "in this run no gain from margin, top 1 %, soft-min-max, alpha learned"
    )


def test_the_histograms(short):
    figure = demo_results.histograms(short[0])
    assert len(figure.axes) == 3 * len(demo.CASES)
    assert figure.axes[0].get_title().startswith("no R2\n")
    for axes in figure.axes[:5]:
        assert axes.get_xlim() == pytest.approx(figure.axes[0].get_xlim())
    counts = figure.axes[0].patches[0].get_data().values
    layer = short[0].layers.index(figure.axes[0].get_title().split("\n")[1].split(":")[0])
    assert sum(counts) == short[0].weights["no R2"][layer].numel()


def test_the_command(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda **options: short[0])
    for _ in range(2):  # the default plot is the demo's own and is replaced
        assert cli.main(["demo", "--json", "a.json", "--force"]) == 0
        assert (tmp_path / "r2kernels_demo.png").read_bytes()[:4] == b"\x89PNG"
    assert "histograms: r2kernels_demo.png\nresults: a.json\n" in capsys.readouterr().out
    data = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert data["cases"]["L-infinity"]["seeds"][0]["ranges"] == short[0].trained["L-infinity"][0].ranges
    assert data["backend"] == short[0].setting["backend"]
    assert all(math.isfinite(data["cases"][case.name]["milliseconds"]["fused"]) for case in demo.CASES[1:])
    (tmp_path / "mine.png").write_text("mine")
    assert cli.main(["demo", "--out", "mine.png"]) == 2
    assert (tmp_path / "mine.png").read_text() == "mine"
