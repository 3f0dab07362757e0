"""The README's commands parse, flags agree over the scripts, the repo speaks of itself alone."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import common
import data
import mkd
import segkc
import speed

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"speed.py": speed, "mkd.py": mkd, "segkc.py": segkc}
LAUNCHER = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}


def commands() -> list[list[str]]:
    """The words of every command of ours in the README's code blocks and code spans."""
    found, variables = [], dict(re.findall(r' (\w+)="(.*?)"', README))
    variables |= re.findall(r"for (\w+) in (\S+)", README)  # a loop's first value
    for text in re.findall(r"^    (.*)$|`([^`\n]+)`", README, re.M):
        line = next(t for t in text if t or t == text[1])
        line = re.sub(r"\$(\w+)", lambda m: variables[m[1]], line)
        for part in re.split(r"&&|;| do ", line.split("  #")[0]):
            words = [w for w in shlex.split(part) if w.split("=")[0] not in LAUNCHER]
            if words[:1] in (["python"], ["torchrun"]):
                found.append(words[1:])
    return found


def shared_actions() -> dict[str, argparse.Action]:
    parser = common.make_parser("x.py", "x")
    return {a.option_strings[0]: a for a in parser._actions}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_parses(words):
    script, argv = words[0], words[1:]
    # a checkpoint that the README names is not there: --test-only would read it for presets
    argv = [w for w in argv if not w.endswith(".pt") and w != "--test-only"]
    if script not in SCRIPTS and script != "data.py":
        assert (ROOT / script).is_file()
        return
    parse = data.make_parser().parse_args if script == "data.py" else SCRIPTS[script].parse_args
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            parse(argv)
    else:
        parse(argv)


def test_there_are_commands():
    assert {w[0] for w in commands()} >= {"speed.py", "mkd.py", "segkc.py", "data.py"}
    assert len(commands()) > 10


def test_the_two_commands_open_the_readme():
    first = README.index("pip install -r requirements.txt && python speed.py")
    second = README.index("pip install -r requirements.txt pytest && pytest")
    assert first < second < README.index("\n## ")
    assert "pip install -r requirements.txt pytest && pytest" in (ROOT / ".ci/run").read_text()


def test_every_equation_is_where_the_readme_says():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 25
    for name, file, line in links:
        code = (ROOT / file).read_text(encoding="utf-8").splitlines()
        # whole words: a good part of the lines start with an m
        start = rf"\s*((def|class) )?{re.escape(name)}(?!\w)"
        found = [i for i, text in enumerate(code, 1) if re.match(start, text)]
        assert int(line) in found, f"{name} is at {file}#L{found}, the README says {line}"


def test_shared_flags_are_identical_over_scripts(monkeypatch):
    parsers = []
    original = common.parse
    monkeypatch.setattr(
        common, "parse", lambda p, *a, **k: parsers.append(p) or original(p, *a, **k)
    )
    for module in SCRIPTS.values():
        module.parse_args([])
    for name, action in shared_actions().items():
        for parser in parsers:
            other = next(a for a in parser._actions if name in a.option_strings)
            for field in ("option_strings", "dest", "nargs", "choices", "help", "metavar"):
                assert getattr(other, field) == getattr(action, field), (name, field)


@pytest.mark.parametrize("module", SCRIPTS.values(), ids=SCRIPTS)
def test_every_flag_has_help_and_is_used(module, monkeypatch):
    seen = []
    original = common.parse
    monkeypatch.setattr(common, "parse", lambda p, *a, **k: seen.append(p) or original(p, *a, **k))
    module.parse_args([])
    text = "".join(
        (ROOT / f).read_text() for f in (Path(module.__file__).name, "common.py", "data.py")
    )
    for action in seen[0]._actions:
        assert action.help, action.option_strings
        if action.dest != "help":
            assert re.search(rf"\b(args|known)\.{action.dest}\b", text), f"dead flag {action.dest}"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dataset", "pascal"], dict(crop_size=321, batch_size=8, epochs=80, lr=1e-3)),
        (["--dataset", "cityscapes"], dict(crop_size=801, epochs=240, sup_loss="ohem", lr=5e-3)),
        (
            ["--dataset", "pascal", "--backbone", "dinov2_vits14"],
            dict(
                crop_size=518, batch_size=16, epochs=60, optimizer="adamw", lr=5e-6, head_lr_mult=40
            ),
        ),
        (
            ["--dataset", "cityscapes", "--backbone", "dinov2_vitb14"],
            dict(crop_size=798, epochs=180),
        ),
        (["--dataset", "shapes"], dict(weights="none", crop_size=64)),
    ],
)
def test_presets(argv, expected):
    args = vars(speed.parse_args(argv))
    assert {k: args[k] for k in expected} == expected
    # off in the released config; on where networks start from scratch
    assert mkd.parse_args(argv).threshold == (0.95 if args["dataset"] == "shapes" else 0)
    vit = [*argv, "--backbone", "dinov2_vits14"]
    assert mkd.parse_args(vit).lr == speed.parse_args(vit).lr  # MKD's rate on shapes is for CNNs
    changed = speed.parse_args([*argv, "--crop-size", "280", "--lr", "0.5"])
    assert (changed.crop_size, changed.lr) == (280, 0.5)


def test_default_data_set_is_pascal_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert speed.parse_args([]).dataset == "shapes"
    voc = tmp_path / "data/VOCdevkit/VOC2012"
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").touch()
    assert speed.parse_args([]).dataset == "pascal"
    assert speed.parse_args(["--root", str(tmp_path / "data")]).dataset == "pascal"
    assert data.find_dataset("shapes", tmp_path) == "shapes"


def test_the_repo_speaks_of_itself_alone():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    private = "../" + "shared"
    for name in tracked.stdout.split():
        if not name.startswith("tests/") and (ROOT / name).suffix in (
            ".py",
            ".md",
            ".txt",
            ".toml",
        ):
            assert private not in (ROOT / name).read_text(encoding="utf-8"), name
