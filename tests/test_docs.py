"""README and docs: commands parse and run, names and steps exist, tables are the tool's."""

import ast
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


@pytest.mark.parametrize("words", commands(README + METHODS + RESULTS), ids=" ".join)
def test_command_parses(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    script, argv = words[0], words[1:]
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


def test_pictures_are_predicted_as_the_readme_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (words,) = [w for w in commands(README) if "--predict" in w]
    with pytest.raises(SystemExit, match="0"):
        speed.main(words[1:])
    with Image.open(folder / "predictions/photo.png") as image:
        by_command = np.array(image)
    lines = re.search(r"In Python:\n\n((?: {4}.*\n)+)", README)[1]
    names = {}
    exec(re.sub("^ {4}", "", lines, flags=re.M), names)
    assert np.array_equal(names["label"], by_command)


BASELINE = re.findall(r"^\| `(\w+\.py)` \| `(--[^`]*)` \| `(--[^`]*)` \|$", README, re.M)


@pytest.mark.parametrize(("script", "others", "shapes"), BASELINE)
def test_the_baseline_has_what_the_method_has(script, others, shapes):
    """As many steps of as many images at the same rate, by the README's table of flags."""
    same = "backbone crop_size scale batch_size epochs optimizer lr head_lr_mult sup_loss".split()
    for name in ("pascal", "cityscapes", "folder", "shapes"):
        argv = ["--dataset", name]
        flags = (shapes if name == "shapes" else others).split()
        baseline = vars(speed.parse_args([*argv, *flags]))
        method = vars(SCRIPTS[script].parse_args(argv))
        assert baseline["labeled_only"]
        assert {k: baseline[k] for k in same} == {k: method[k] for k in same}, name


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
def test_steps_and_names_of_methods_are_those_of_the_script(script):
    table = steps_table(script)
    assert list(table) == list(range(1, len(table) + 1))
    assert set(paragraphs(script)) == set(table)
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    defined = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for step, cell in table.items():
        names = re.findall(r"`([\w.]+)`", cell)
        for name in names:
            module, _, attribute = name.rpartition(".")
            shared = module and hasattr(dict(common=common, data=data)[module], attribute)
            assert shared or name in defined, f"{script}, step {step}: {name}"
        text = "\n".join(paragraphs(script)[step])
        assert any(re.search(rf"\b{re.escape(n)}\b", text) for n in names), f"{script}, step {step}"


def test_rows_of_results_are_printed_by_the_tool():
    printed = "".join(p.read_text("utf-8") for p in ROOT.glob("docs/results/*.txt"))  # by bench.py
    for words in commands(RESULTS):
        if words[0] == "docs/reproduce/table.py":
            printed += subprocess.check_output([sys.executable, *words], cwd=ROOT, text=True)
    rows = re.findall(r"^\| `[\w-]+` \| \d.*$", README + RESULTS, re.M)
    rows += re.findall(r"^\| [^|`\n]+ \| [^`\n]*\d.*$", RESULTS, re.M)
    assert len(rows) > 50
    assert set(rows) <= set(printed.splitlines())


def test_the_readme_is_short_and_opens_with_a_sentence_and_two_commands():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert len(README.encode()) <= 13_000
    for line in lines + METHODS.splitlines() + RESULTS.splitlines():
        assert len(line.encode()) <= 140 or line.startswith(("|", "    ")), line
    assert not re.search(r"\.py#L\d", README + METHODS + RESULTS)
    for link in re.findall(r"\]\((?!https:)([\w./-]+)", README):
        assert (ROOT / link).exists(), link
    _, sentence, block = README.split("\n\n")[:3]
    assert sentence.count(".") == 1
    two = [line.split("  #")[0].strip() for line in block.splitlines()]
    assert two == ["pip install -r requirements.txt && python speed.py", TEST_COMMAND]


def test_flags_are_used_are_named_rightly_and_if_shared_the_same_in_all_scripts(monkeypatch):
    parsers = []
    parse = common.parse
    monkeypatch.setattr(common, "parse", lambda p, *a, **k: parsers.append(p) or parse(p, *a, **k))
    for module in SCRIPTS.values():
        module.parse_args([])
    shared = common.make_parser(speed.__file__, "")._actions
    for parser in parsers:
        for one in shared:
            other = parser._option_string_actions[one.option_strings[0]]
            differ = {k for k, v in vars(one).items() if v != vars(other)[k]}
            assert differ <= {"default", "container"}, one.dest
    for parser, script in zip(parsers, SCRIPTS, strict=True):
        text = "".join((ROOT / f).read_text() for f in (script, "common.py", "data.py"))
        for action in parser._actions[1:]:
            assert action.help, action.dest
            used = rf"\b(args|settings|first)\.{action.dest}\b"
            assert re.search(used, text), f"{script}: dead flag {action.dest}"
    known = {flag for p in (*parsers, data.make_parser()) for flag in p._option_string_actions}
    assert set(re.findall(r"`(--[\w-]+)", README + METHODS + RESULTS)) <= known


def test_the_repo_speaks_of_itself_alone():
    names = "common.py data.py README.md requirements.txt pyproject.toml LICENSE .ci/run".split()
    ours = [ROOT / name for name in (*SCRIPTS, *names)]
    for path in [*ours, *(f for f in ROOT.glob("docs/**/*.*") if f.suffix != ".png")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\.\./shared|/work/|issues? show|\bissue \d", text), path
