"""What README and docs say: commands parse and run, names and steps exist, tables are the tool's."""

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import mkd
import segkc
import speed

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs/results.md").read_text(encoding="utf-8")
SCRIPTS = {"speed.py": speed, "mkd.py": mkd, "segkc.py": segkc}
LAUNCHER = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
TEST_COMMAND = "pip install -r requirements.txt pytest && pytest"


def commands(text: str) -> list[list[str]]:
    """[script, argument, ...] of each command in a code block or a code span."""
    found = []
    for block, span in re.findall(r"^ {4,}(.*)$|`([^`\n]+)`", text, re.M):
        line = re.split(r"  +#", block or span)[0]
        for part in line.split("&&"):
            words = part.split()
            if words and words[0] in ("python", "torchrun") and ".py" in part:
                found.append([w for w in shlex.split(part) if w.split("=")[0] not in LAUNCHER][1:])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the best.pt and the pictures that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    best = folder / "runs/speed-shapes-1-16-s0/best.pt"
    best.parent.mkdir(parents=True)
    net = common.build_network("resnet18", len(data.SHAPES_CLASSES))
    saved = dict(net=net.state_dict(), config=net.config, classes=data.SHAPES_CLASSES)
    saved |= dict(dataset="shapes", eval=dict(crop_size=65, eval_mode="whole", amp="off"))
    torch.save(saved, best)
    (folder / "PICTURES").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    shutil.copy(folder / "photo.jpg", folder / "PICTURES")
    return folder


# ------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("words", commands(README + METHODS + RESULTS), ids=" ".join)
def test_command_parses(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    script, argv = words[0].replace("mine.py", "speed.py"), words[1:]
    parse = data.make_parser().parse_args
    if script in SCRIPTS:
        parse = SCRIPTS[script].parse_args
    elif script != "data.py":  # a tool: its options are in its source
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in argv:
            assert not word.startswith("--") or f'"{word}"' in source, word
            assert not word.startswith("docs/") or (ROOT / word).exists(), word
        return
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            parse(argv)
    else:
        parse(argv)


def test_there_are_commands():
    scripts = [words[0] for words in commands(README)]
    assert set(scripts) >= {"speed.py", "mkd.py", "segkc.py", "data.py"}
    assert len(scripts) >= 10
    assert len(commands(RESULTS)) >= 5


def test_pictures_are_predicted_as_the_readme_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (words,) = [w for w in commands(README) if "--predict" in w]
    speed.main(words[1:])
    with Image.open(folder / "predictions/photo.png") as image:
        by_command = np.array(image)
    lines = re.search(r"In Python:\n\n((?: {4}.*\n)+)", README)[1]
    names = {}
    exec(re.sub("^ {4}", "", lines, flags=re.M), names)
    assert len(lines.splitlines()) == 4
    assert np.array_equal(names["label"], by_command)
    assert names["classes"] == data.SHAPES_CLASSES


BASELINE = re.findall(r"^\| `(\w+\.py)` \| `(--[^`]*)` \| `(--[^`]*)` \|$", README, re.M)


@pytest.mark.parametrize(("script", "others", "shapes"), BASELINE)
def test_the_baseline_has_what_the_method_has(script, others, shapes):
    """As many steps of as many images at the same rate, by the README's table of flags."""
    same = "backbone weights crop_size scale batch_size epochs optimizer lr head_lr_mult".split()
    same += "weight_decay sup_loss eval_mode output_stride decoder".split()
    for name in ("pascal", "cityscapes", "folder", "shapes"):
        argv = ["--dataset", name]
        flags = (shapes if name == "shapes" else others).split()
        baseline = vars(speed.parse_args([*argv, *flags]))
        method = vars(SCRIPTS[script].parse_args(argv))
        assert baseline["labeled_only"]
        assert {k: baseline[k] for k in same} == {k: method[k] for k in same}, name


def test_there_is_a_baseline_of_each():
    assert [row[0] for row in BASELINE] == list(SCRIPTS)


def test_a_fork_by_the_readmes_edits_trains_and_goes_on(tmp_path):
    block = re.search(r"three edits:\n\n((?: {4}.*\n|\n)+)", README)[1]
    flag, function, total = re.split(r"^ {4}# \d\..*\n", block, flags=re.M)[1:]
    outdented = re.sub("^ {4}", "", function, flags=re.M).strip()
    code = (ROOT / "speed.py").read_text(encoding="utf-8")
    for before, text in (
        ("    return common.parse(p, argv)", flag.rstrip()),
        ("def speed_step(", outdented + "\n\n"),
        ("    loss = 0.5 * (", total.rstrip()),
        ('        "L_x": loss_x', '        "L_ent": loss_ent,'),
    ):
        assert code.count(before) == 1
        code = code.replace(before, f"{text}\n{before}")
    (tmp_path / "mine.py").write_text(code)
    for name in ("common.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "mine.py", "--dataset", "shapes", "--iters", "3", "--log-every", "1"]
    command += ["--batch-size", "2", "--crop-size", "33", "--gamma", "0.5", "--threshold", "0"]
    command += ["--eval-every", "3"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "finished before" in done.stdout
    log = (tmp_path / "runs/mine-shapes-1-16-s0/log.jsonl").read_text()
    assert log.count('"L_ent"') == 3


# ----------------------------------------------------------------------------- methods, results


def steps_table(script: str) -> dict[int, str]:
    """{step: the last cell of its row} of a script's table of equations."""
    section = re.split(r"^## ", METHODS, flags=re.M)
    (text,) = [s for s in section if f"`{script}`" in s.splitlines()[0]]
    return {int(n): cell for n, cell in re.findall(r"^\| (\d+) \|.*\| (.*) \|$", text, re.M)}


def paragraphs(script: str) -> dict[int, list[str]]:
    """{step: the paragraphs of code that name it, as in (step 3), (steps 4, 5), (steps 7 to 10)}"""
    found = {}
    for paragraph in re.split(r"\n\s*\n", (ROOT / script).read_text(encoding="utf-8")):
        for text in re.findall(r"\(steps? (\d[\d, to]*)\)", paragraph):
            first, *more = [int(n) for n in re.findall(r"\d+", text)]
            named = range(first, more[0] + 1) if "to" in text else (first, *more)
            for n in named:
                found.setdefault(n, []).append(paragraph)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_are_those_of_the_comments(script):
    table = steps_table(script)
    assert list(table) == list(range(1, len(table) + 1))
    assert set(paragraphs(script)) == set(table)


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_a_step_are_where_its_comment_is(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    defined = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.ctx == ast.Store()}
    defined = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for step, cell in steps_table(script).items():
        names = re.findall(r"`([\w.]+)`", cell)
        assert names, step
        for name in names:
            module, _, attribute = name.rpartition(".")
            known = hasattr(dict(common=common, data=data)[module], attribute) if module else None
            assert known or name in defined, f"{script}, step {step}: {name}"
        text = "\n".join(paragraphs(script)[step])
        assert any(re.search(rf"\b{re.escape(n)}\b", text) for n in names), f"{script}, step {step}"


def test_other_names_exist():
    for text in (README, METHODS, RESULTS):
        for module, name in re.findall(r"`(common|data)\.(\w+)`", text):
            assert name == "py" or hasattr(dict(common=common, data=data)[module], name), name
        for name in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
            where = ROOT if text is README else ROOT / "docs"
            assert (where / name).exists(), name


def test_rows_of_results_are_printed_by_the_tool():
    table = ROOT / "docs/reproduce/table.py"
    printed = ""
    for words in commands(RESULTS):
        if words[0] == "docs/reproduce/table.py":
            command = [sys.executable, table, *words[1:]]
            printed += subprocess.check_output(command, cwd=ROOT, text=True)
    rows = re.findall(r"^\| `[\w-]+` \| \d.*$", README + RESULTS, re.M)
    assert len(rows) > 20
    for row in rows:
        assert row in printed.splitlines(), row


# --------------------------------------------------------------------------------------- README


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert len(README.encode()) <= 13_000
    for line in lines + METHODS.splitlines() + RESULTS.splitlines():
        assert len(line) <= 140 or line.startswith(("|", "    ")), line
    for text in (README, METHODS, RESULTS):
        assert not re.search(r"\.py#L\d", text)


def test_a_sentence_and_the_two_commands_open_the_readme():
    title, sentence, block = README.split("\n\n")[:3]
    assert title.startswith("# ")
    assert sentence.count(".") == 1
    first, second = (line.split("  #")[0].strip() for line in block.splitlines())
    assert first == "pip install -r requirements.txt && python speed.py"
    assert second == TEST_COMMAND


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
@pytest.mark.parametrize("text", [README, README.replace(TEST_COMMAND, "pytest")])
def test_ci_runs_the_readmes_test_command_or_fails(text, tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    stubs = {name: f'echo {name} "$@" >> log' for name in ("pip", "ruff", "pytest")}
    stubs["python3"] = "mkdir -p .venv/bin; touch .venv/bin/activate"
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=env, capture_output=True, text=True)
    if text is README:
        assert done.returncode == 0, done.stderr
        log = (tmp_path / "log").read_text().splitlines()
        assert log[-2:] == ["pip install -r requirements.txt pytest", "pytest"]
    else:
        assert done.returncode != 0
        assert "README.md" in done.stderr


# ---------------------------------------------------------------------------------------- flags


def test_shared_flags_are_the_same_in_all_scripts(monkeypatch):
    parsers = []
    parse = common.parse
    monkeypatch.setattr(common, "parse", lambda p, *a, **k: parsers.append(p) or parse(p, *a, **k))
    for module in SCRIPTS.values():
        module.parse_args([])
    shared = common.make_parser(speed.__file__, "")._actions
    assert len(shared) > 30
    for parser in parsers:
        for one in shared:
            (other,) = [a for a in parser._actions if a.option_strings[0] == one.option_strings[0]]
            for field in ("option_strings", "dest", "nargs", "choices", "help", "metavar", "type"):
                assert getattr(other, field) == getattr(one, field), (one.dest, field)
    for parser, script in zip(parsers, SCRIPTS, strict=True):
        text = "".join((ROOT / f).read_text() for f in (script, "common.py", "data.py"))
        for action in parser._actions[1:]:
            assert action.help, action.dest
            used = rf"\b(args|settings|first)\.{action.dest}\b"
            assert re.search(used, text), f"{script}: dead flag {action.dest}"


def test_the_repo_speaks_of_itself_alone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.startswith("tests/") or name.endswith((".png", ".jsonl")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"\.\./shared|/work/|issues? show|\bissue \d", text), name
