"""What the three scripts have in common, how they are written, and values of short runs.

`PYTHONPATH=. python tests/test_scripts.py --record` writes these values anew.
"""

import ast
import json
import sys
import tempfile
from pathlib import Path

import helpers as h
import pytest
import torch

import data
import mkd
import segkc
import speed

SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}
ROOT = Path(speed.__file__).parent
TREES = {p.stem: ast.parse(p.read_text()) for p in ROOT.glob("*.py")}


# ------------------------------------------------------------------------- how they are written


def main_of(name: str) -> ast.FunctionDef:
    (found,) = (n for n in TREES[name].body if isinstance(n, ast.FunctionDef) and n.name == "main")
    return found


def blocks(name: str) -> dict[str, list[str]]:
    """The lines of a main() under the first word of each banner."""
    found, node = {"": []}, main_of(name)
    for line in (ROOT / f"{name}.py").read_text().splitlines()[node.lineno - 1 : node.end_lineno]:
        if line.strip().startswith("# ---- "):
            found[line.split("# ---- ")[1].replace(":", " ").split()[0].strip(",s")] = []
        found[[*found][-1]].append(line)
    return found


def shared(name: str) -> dict[str, list[str]]:
    """The blocks of a main() without what is a method's own."""
    found = blocks(name)
    found["network"] = []
    lines = found["optimizer"]
    first = lines.index(next(x for x in lines if "fused = " in x))
    found["optimizer"] = [lines[0], *lines[first:]]
    own = ("    nets = {", "    state = {")
    found["resume"] = [line for line in found["resume"] if not line.startswith(own)]
    step = [k for k, line in enumerate(found["train"]) if "ramp = " in line or "zero_grad" in line]
    del found["train"][step[0] + 1 : step[1]]  # the call of the step
    return found


def test_the_main_functions_share_their_blocks():
    """Guards: a loop that is mended in one script alone."""
    order = "rank data network optimizer precision resume train log teardown".split()
    first = shared("speed")
    assert [*first] == ["", *order]
    assert len(sum(first.values(), [])) > 60, "most of main() is shared"
    for name in ("mkd", "segkc"):
        for (banner, lines), mine in zip(shared(name).items(), first.values(), strict=True):
            assert lines == mine, (name, banner)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_written_plainly(name: str):
    nodes = [*ast.walk(TREES[name])]
    lines = len({n.lineno for n in nodes if isinstance(n, ast.stmt)})
    made = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assigned = [n for n in nodes if isinstance(n, ast.Assign)]
    tuples = [n for n in assigned if isinstance(n.targets[0], (ast.Tuple, ast.List))]
    for n in tuples:
        lazy = isinstance(n.value, ast.Call) and ast.unparse(n.value.func) in ("map", "zip")
        assert not lazy, ast.unparse(n)
        assert not isinstance(n.value, made), ast.unparse(n)
    comprehensions = [n for n in nodes if isinstance(n, made)]
    assert len(tuples) <= 0.04 * lines, (len(tuples), lines)
    assert len(comprehensions) <= 0.04 * lines, (len(comprehensions), lines)
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not imported & (set(SCRIPTS) - {name}), "a script imports another"
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    assert "part.compile()" in map(ast.unparse, calls), "--compile does nothing"
    for n in (n for n in calls if "supervised_loss" in ast.unparse(n.func)):  # CE or OHEM, by flags
        assert [ast.unparse(a) for a in n.args[2:]] == ["args.sup_loss", "args.ohem_share"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_torch_is_in_view(name: str):
    text = "\n".join(sum(blocks(name).values(), []))
    words = "init_process_group SyncBatchNorm DistributedDataParallel torch.autocast GradScaler "
    words += "optim.SGD optim.AdamW zero_grad .backward() scaler.step ** 0.9"
    assert all(word in text for word in words.split())
    assert text.count("convert_sync_batchnorm(") == text.count(" = common.build_network(")


def test_common_owns_no_run():
    nodes = [*ast.walk(TREES["common"])]
    named = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    named |= {n.id for n in nodes if isinstance(n, ast.Name)}
    torch_in_view = {"backward", "zero_grad", "DistributedDataParallel", "convert_sync_batchnorm"}
    assert not named & (torch_in_view | {"SGD", "AdamW", "init_process_group"})
    classes = [n for n in TREES["common"].body if isinstance(n, ast.ClassDef)]
    assert {n.name for n in classes if not n.bases} == {"Log"}, "one more class without a module"
    assert not {"speed", "mkd", "segkc", "common"} & {
        a.name for n in ast.walk(TREES["data"]) if isinstance(n, ast.Import) for a in n.names
    }


def test_the_flags_default_to_the_notes_values():
    common = dict(ramp=0.0, iters=None, sup_loss="ce", ohem_share=0.156)
    values = dict(threshold=0.95, lambda_u=1.0, alpha=1.0, beta=1.0, temperature=1.0)
    values |= dict(grid=4, pick="max", entropy_mix=True, host_cutmix=True, feature_temperature=0.1)
    check = {speed: values}
    check[mkd] = dict(ema=0.6, lambda_st=1.5, lambda_ss=1.0, lambda0=1.5, threshold=0.0)
    check[mkd] |= dict(threshold_ss=0.0, keep_padding=False, teacher_mode="eval", fa="students")
    check[segkc] = dict(lambda_cps=1.0, lambda_feat=0.5, lambda_kd=0.5, consult="both")
    check[segkc] |= dict(temperature=1.0, threshold=0.95, senior="resnet101", backbone="resnet50")
    for script, expected in check.items():
        args = vars(script.parse_args(["--dataset", "pascal"]))
        assert {k: args[k] for k in expected | common} == expected | common
    assert segkc.parse_args(["--junior", "resnet34"]).backbone == "resnet34"
    for script, flags in ((mkd, ["--fa", "all"]), (segkc, ["--weights", "x.pt"])):
        with pytest.raises(data.InputError, match="give --(teacher-mode train|senior-weights)"):
            script.parse_args(["--dataset", "pascal", *flags])
    mkd.parse_args("--dataset pascal --fa all --backbone dinov2_vits14 --decoder dpt".split())


# --------------------------------------------------------------------- values of short runs


def test_adamw_decays_decoupled_from_the_gradient(tmp_path, monkeypatch):
    """One step of --labeled-only by hand: p (1 - lr decay) - lr g / (|g| + 1e-8), heads: 3 lr."""
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    flags = "--labeled-only --iters 1 --optimizer adamw --lr 0.01 --weight-decay 2".split()
    args = speed.parse_args([*h.TINY, *flags])
    batch = h.batches_of(args)[0]
    torch.manual_seed(args.seed)
    net = h.network(args.backbone)
    loss = h.supervised(h.look(net, h.standardized(batch["x"]))["z"], batch["y"])
    loss.backward()
    lines, latest, _ = h.run_main(speed, [*h.TINY, *flags], tmp_path)
    assert lines[0]["loss"] == pytest.approx(loss.item(), rel=2e-5)
    names = {p: name for name, p in net.named_parameters()}
    for parameters, rate in zip(h.split_parameters(net), (0.01, 0.03), strict=True):
        for p in parameters:
            g = p.grad.abs()
            sure = g > 1e-2 * g.max().clamp_min(1e-3)  # rounding has not made the sign
            mine = p * (1 - rate * 2) - rate * p.grad / (g + 1e-8)
            apart = (mine - latest["net"][names[p]])[sure].abs()
            assert (apart < 0.02 * rate).float().mean() > 0.99, names[p]  # but for a ReLU at zero
    for group in latest["optimizer"]["param_groups"]:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)


RUNS = {
    # coins, so that rounding picks no view; the ramp is 0, 1 / 1.2 and 1
    "speed": "--threshold 0 --iters 3 --ramp 0.4 --pick random --grid 3",
    "mkd": "--threshold 0 --threshold-ss 0 --ramp 0 --fa students",
    "segkc": "--threshold 0 --ramp 0",
}
REFERENCE = ROOT / "tests/reference.json"


def first_lines(run: str, out: Path) -> dict[str, list[float]]:
    """The terms of all train lines. At a low rate: AdamW's first steps magnify rounding."""
    flags = "--dataset shapes --crop-size 49 --iters 2 --log-every 1 --workers 0 --amp off "
    lines, *_ = h.run_main(SCRIPTS[run], f"{flags} --lr 1e-5 {RUNS[run]}".split(), out)
    terms = [k for k in lines[0] if k not in ("kind", "step", "lr", "images_s", "memory_gb")]
    return {k: [line[k] for line in lines] for k in terms}


@pytest.mark.parametrize("run", RUNS)
def test_short_runs_have_the_recorded_values(run: str, tmp_path, monkeypatch):
    """Guards: a change of numbers that nobody meant, in batches, networks or steps."""
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    expected, found = json.loads(REFERENCE.read_text())[run], first_lines(run, tmp_path)
    assert found.keys() == expected.keys()
    for term, values in expected.items():
        assert found[term] == pytest.approx(values, rel=1e-3), term


if __name__ == "__main__" and sys.argv[1:] == ["--record"]:  # after a change that is meant
    torch.set_num_threads(1)
    data.SHAPES_VAL = 2
    with tempfile.TemporaryDirectory() as folder:
        rows = {run: first_lines(run, Path(folder) / "run") for run in RUNS}
    text = ",\n".join(f"{json.dumps(run)}: {json.dumps(row)}" for run, row in rows.items())
    REFERENCE.write_text(f"{{\n{text}\n}}\n")
