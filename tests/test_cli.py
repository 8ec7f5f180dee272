"""The command line: wrong input ends in one sentence and changes nothing; light commands stay light."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import write_space

from ucc_search import cli

ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a space file, a warm cache and one finished run, shared by the module's tests."""
    folder = tmp_path_factory.mktemp("home")
    write_space(folder)
    done = in_shell(folder, "search", "space.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def ucc(home, monkeypatch, capsys):
    """Calls the command in this process, in `home`; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(home / "cache"))
    monkeypatch.delenv("UCC_SEARCH_PLUGINS", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ucc-search", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


def in_shell(folder: Path, *arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`python -m ucc_search` in a process of its own, its output piped."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        "UCC_SEARCH_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("UCC_SEARCH_PLUGINS", None)
    command = [sys.executable, *flags, "-m", "ucc_search", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, the cache's aside."""
    files = (p for p in folder.rglob("*") if p.is_file() and "cache" not in p.relative_to(folder).parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def garbage(folder: Path) -> None:
    """Files that are not what their names say."""
    for name in ("torn.safetensors", "torn.pth"):
        (folder / name).write_bytes(b"not a checkpoint " * 9)
    save_file(
        {"head.weight": torch.zeros(100, 16), "head.bias": torch.zeros(100)}, folder / "other.safetensors"
    )
    (folder / "torn.yaml").write_text("name: [a\nmodel: {", encoding="utf-8")
    (folder / "control.yaml").write_text("name: '\x07'\n", encoding="utf-8")
    (folder / "list.yaml").write_text("- a\n- b\n", encoding="utf-8")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "shape.py").write_text("class Shape: pass\n", encoding="utf-8")
    (folder / "unhooked.py").write_text(UNHOOKED, encoding="utf-8")


UNHOOKED = """from ucc_search import Scorer
class Mine(Scorer):
    def score(self, view):
        return view.patches_BND.norm(dim=-1)
"""
SEARCH = ("search", "space.yaml", "--out", "new")
SWIN = ("model.name=swin_tiny_patch4_window7_224", "model.args={}", "model.checkpoint=null")


def sets(*overrides: str) -> tuple[str, ...]:
    return (*SEARCH, *(text for o in overrides for text in ("--set", o)))


# Arguments, and what the sentence must say: where, what came, what is allowed or what to do.
WRONG = {
    "no model to export": (("export", "empty", "--out", "new"), ["empty", "no arch.json", "--trial"]),
    "no model to push": (("push", "empty", "--repo-id", "a/b"), ["empty", "no arch.json"]),
    "no model to bench": (("bench", "empty"), ["empty", "no arch.json"]),
    "nothing to compare": (("compare", "space.yaml"), ["compare", "name your method", "--scorer my_score"]),
    "an unknown contender": (
        ("compare", "space.yaml", "--scorer", "spectrl", "--out", "new"),
        ["unknown scorer 'spectrl'", "did you mean 'spectral'?"],
    ),
    "missing space": (("search", "spcae.yaml", "--out", "new"), ["spcae.yaml", "did you mean 'space.yaml'"]),
    "folder as space": (("plan", "empty"), ["empty", "is a folder", "space file (YAML)"]),
    "run as space": (("sensitivity", "run"), ["run: is a folder", "run/config.resolved.yaml"]),
    "YAML syntax": (("plan", "torn.yaml"), ["torn.yaml", "not valid YAML at line 2, column 6"]),
    "YAML control": (("plan", "control.yaml"), ["control.yaml", "not valid YAML"]),
    "YAML list": (("plan", "list.yaml"), ["list.yaml", "expected a mapping", "model, data, budget"]),
    "unknown key": (sets("search.trails=3"), ["space.yaml", "'search.trails'", "did you mean 'trials'?"]),
    "unknown section": (sets("serach.trials=3"), ["space.yaml", "'serach'", "did you mean 'search'?"]),
    "override without =": (sets("search.trials"), ["--set 'search.trials'", "key=value"]),
    "override of a leaf": (sets("name.x=3"), ["--set 'name.x=3'", "not a section"]),
    "no cluster there": (
        (*SEARCH, "--ray-address", "127.0.0.1:9"),
        ["no Ray cluster answers at 127.0.0.1:9", "leave --ray-address out"],
    ),
    "Ray Client": (
        (*SEARCH, "--ray-address", "ray://head:10001"),
        ["ray://head:10001", "expected HOST:PORT"],
    ),
    "a GPU for two": (
        sets("train.engine=deepspeed", "train.workers=2", "search.gpus_per_trial=1"),
        ["search.gpus_per_trial is 1", "train.workers is 2"],
    ),
    "status of nothing": (("status", "empty"), ["empty", "not a run folder"]),
    "no trials": (
        (*SEARCH, "--trials", "-1"),
        ["space.yaml", "search.trials is -1", "greater than or equal to 0"],
    ),
    "ladder without keep": (
        sets("search.ladder=[{rung: zero-shot}, {rung: train}]"),
        ["search.ladder", "rung 2 needs `keep`"],
    ),
    "ladder's key": (
        sets("search.ladder=[{rung: zero-shot}, {rung: train, kep: 1}]"),
        ["'search.ladder.1.kep'", "did you mean 'keep'?"],
    ),
    "ladder that is flat": (
        sets("search.ladder=[{rung: train, steps: 999}, {rung: train, keep: 1}]"),
        ["search.ladder: rung 2 ends at step", "expected more than the 999"],
    ),
    "time limit 0": (sets("search.trial_timeout=0"), ["search.trial_timeout is 0", "greater than 0"]),
    "keep ratio 0": (
        sets("space.keep_ratio={low: 0, high: 1}"),
        ["space.keep_ratio", "low is 0", "0 < keep"],
    ),
    "keep ratio 1.5": (sets("space.keep_ratio.high=1.5"), ["space.keep_ratio", "high is 1.5", "<= 1"]),
    "keep ratio reversed": (sets("space.keep_ratio={low: 0.9, high: 0.5}"), ["0.9", "low < high"]),
    "learning rate": (sets("train.optimizer.lr=-1"), ["train.optimizer.lr is -1", "greater than 0"]),
    "average's decay": (sets("train.ema=1"), ["train.ema.decay is 1", "less than 1"]),
    "average's key": (
        sets("train.ema={decay: 0.9, rmap: true}"),
        ["'train.ema.rmap'", "did you mean 'ramp'?", "every"],
    ),
    "fold without CutMix": (sets("train.augment.cutmix_fold=true"), ["train.augment", "cutmix above 0"]),
    "range reversed": (
        sets("space.distiller={name: logits, weight: {low: 3, high: 1}}"),
        ["space.distiller.logits.weight", "needs low <= high, got low=3 high=1"],
    ),
    "unknown scorer": (
        sets("space.scorer=clas_attention"),
        ["unknown scorer 'clas_attention'", "did you mean 'class_attention'?", "available: ", "joint"],
    ),
    "unknown parameter": (
        sets("space.scorer={name: spectral, sing: low}"),
        ["scorer 'spectral'", "'sing'", "did you mean 'sign'?", "fft_axis"],
    ),
    "parameter value": (
        sets("space.cascade={name: geometric, gamma: 3}"),
        ["cascade 'geometric'", "gamma is 3", "0 to 1"],
    ),
    "baseline's scorer": (
        sets("baselines=[{name: b, scorer: randm}]"),
        ["unknown scorer 'randm'", "did you mean 'random'?"],
    ),
    "budget too small": (
        (*SEARCH, "--budget", "macs=5%"),
        [
            "budget macs=5%",
            "reachable are",
            "% to 100% of",
            "raise the budget, lower space.keep_ratio.low or",
        ],
    ),
    "budget no number": ((*SEARCH, "--budget", "macs=abc"), ["budget.macs is 'abc'", "such as 2.1G"]),
    "budget 0%": ((*SEARCH, "--budget", "macs=0%"), ["budget.macs is '0%'", "above 0% and up to 100%"]),
    "budget without =": ((*SEARCH, "--budget", "50%"), ["--budget '50%'", "METRIC=VALUE"]),
    "budget's metric": ((*SEARCH, "--budget", "mac=50%"), ["'budget.mac'", "did you mean 'macs'?"]),
    "torn safetensors": (sets("model.checkpoint=torn.safetensors"), ["torn.safetensors", "not a readable"]),
    "torn pth": (sets("model.checkpoint=torn.pth"), ["torn.pth", "not a readable", "plain tensors"]),
    "no checkpoint": (sets("model.checkpoint=gone.pth"), ["gone.pth", "no such checkpoint"]),
    "class count": (
        sets("model.checkpoint=other.safetensors"),
        ["other.safetensors", "100 classes", "the data has 10", "train-teacher"],
    ),
    "no teacher section": (sets("teacher=null"), ["model.checkpoint is 'auto'", "`teacher:`"]),
    "no images": (sets("data.name='folder:empty'"), ["empty", "holds no images", "one folder per class"]),
    "no folder": (sets("data.name='folder:gone'"), ["gone", "no such folder"]),
    "unknown data": (sets("data.name=digit"), ["data.name is 'digit'", "did you mean 'digits'?", "hf:NAME"]),
    "unknown model": (
        sets("model.name=deit_tny_patch16_224"),
        ["no model 'deit_tny_patch16_224'", "did you mean deit_tiny_patch16_224"],
    ),
    "model's arguments": (sets("model.args={bogus: 1}"), ["model.args", "'bogus'"]),
    "Swin": (sets(*SWIN), ["swin_tiny_patch4_window7_224", "cannot be compressed", "windows"]),
    "unknown plugin": ((*SEARCH, "--plugin", "gone/plugin.py"), ["gone/plugin.py", "no such .py file"]),
    "folder taken": (
        ("search", "space.yaml", "--out", "run"),
        ["run already exists", "--resume", "another --out"],
    ),
    "file taken": (
        ("search", "space.yaml", "--out", "space.yaml"),
        ["space.yaml already exists", "no run folder"],
    ),
    "nothing to resume": ((*SEARCH, "--resume"), ["new", "not a run folder"]),
    "resumed differently": (
        ("search", "space.yaml", "--out", "run", "--resume", "--seed", "7"),
        ["run was made with search.seed: 0, now it is 7", "set it back"],
    ),
    "reproduce no trial": (("reproduce", "run", "--trial", "99"), ["run has no trial 99", "its trials are"]),
    "reproduce no run": (("reproduce", "empty", "--trial", "0"), ["empty", "not a run folder"]),
    "info misspelt": (("plugins", "info", "jiont"), ["nothing is called 'jiont'", "did you mean 'joint'?"]),
    "validate nothing": (("plugins", "validate", "--no-plugins"), ["nothing to validate", "--plugin"]),
    "validate no file": (("plugins", "validate", "--plugin", "absent.py"), ["absent.py", "no such .py file"]),
    "validate a file as a name": (("plugins", "validate", "shape.py"), ["'shape.py'", "--plugin shape.py"]),
    "validate no plugin": (
        ("plugins", "validate", "--plugin", "shape.py"),
        ["shape.py holds no component", "plugins new NAME --kind KIND", "scorer, aggregator"],
    ),
    "validate no hook": (
        ("plugins", "validate", "--plugin", "unhooked.py"),
        ["unhooked.py holds the scorer Mine", "@hookimpl def ucc_scorers()", "{'mine': Mine}"],
    ),
    "validate another kind": (
        ("plugins", "validate", "--plugin", "unhooked.py", "aggregator:mine"),
        ["nothing is called 'aggregator:mine'", "unhooked.py holds the scorer Mine"],
    ),
    "new with the kind as a word": (
        ("plugins", "new", "scorer", "mine"),
        ["one name, got 'scorer' and 'mine'", "plugins new mine --kind scorer"],
    ),
    "new of no kind": (("plugins", "new", "x", "--kind", "scoer"), ["did you mean 'scorer'?", "kinds:"]),
    "disabled misspelt": (("plugins", "list", "--disable-plugin", "biultin"), ["did you mean 'builtin'?"]),
    "data set of no plugin": (sets("data.name=plugin:mine"), ["unknown dataset 'mine'"]),
    "no range to search": (
        sets("space.scorer={name: joint, sign: search}"),
        ["'joint' declares no range for sign", "mix, kappa"],
    ),
    "analyze no run": (("analyze", "empty"), ["empty", "not a run folder", "ucc-search search"]),
    "analyze misspelt": (("analyze", "rum"), ["rum", "did you mean 'run'?"]),
    "pick too small": (
        ("pick", "run", "--max-macs", "1k"),
        ["no trial fits", "the fewest of any", "allow more"],
    ),
    "analyze with no run": (("analyze", "run", "empty"), ["empty", "not a run folder"]),
    "sensitivity of too much": (
        ("sensitivity", "space.yaml", "--keep", "2"),
        ["--keep is 2", "above 0 and below 1"],
    ),
    "report of no run": (("report", "empty"), ["empty", "not a run folder"]),
    "report into a file": (
        ("report", "run", "--out", "space.yaml/report.html"),
        ["space.yaml/report.html", "cannot be written", "another --out"],
    ),
    "pick by latency": (
        ("pick", "run", "--max-latency-ms", "3"),
        ["no trial's latency was measured", "budget.latency_ms"],
    ),
    "pick no amount": (("pick", "run", "--max-params", "few"), ["--max-params is 'few'", "such as 2.1G"]),
    "inspect unknown": (("models", "inspect", "vit_tny_patch16_224"), ["vit_tny", "vit_tiny_patch16_224"]),
    "inspect argument": (
        ("models", "inspect", "vit_tiny_patch16_224", "--arg", "x"),
        ["--arg 'x'", "key=value"],
    ),
    "teacher without recipe": (
        ("train-teacher", "space.yaml", "--out", "new", "--set", "teacher=null"),
        ["no `teacher:` section"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_changes_nothing(case, home, ucc):
    arguments, expected = WRONG[case]
    garbage(home)
    before = contents(home)
    code, out, err = ucc(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert not [text for text in expected if text not in err], err
    assert len(err) < 500, "a sentence, not a page"
    assert not re.search(r"https?://|<class|object at 0x", err), err
    assert out == ""
    assert contents(home) == before
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("serach", "space.yaml"), "No such command 'serach'"),
        (("search",), "Missing argument"),
        (("search", "space.yaml", "--budgets", "macs=50%"), "No such option: --budgets"),
        (("search", "space.yaml", "--trials", "many"), "Invalid value for '--trials'"),
    ],
)
def test_misused_options_are_wrong_input_too(arguments, expected, home, ucc):
    before = contents(home)
    code, _, err = ucc(*arguments)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert contents(home) == before


def test_an_interrupt_is_reported_as_one(home, ucc, monkeypatch, tmp_path):
    """Exit codes 130 and 143 tell scripts that the same command may go on later."""
    from ucc_search import runner, worker

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "measure", stop)
    folder = tmp_path / "stopped"
    code, _, err = ucc("search", "space.yaml", "--out", str(folder))
    assert (code, err) == (130, f"stopped; continue with --resume --out {folder}\n")

    def terminate(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(worker, "measure", terminate)
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = ucc("search", "space.yaml", "--out", str(folder), "--resume")
    assert (code, err) == (143, f"stopped; continue with --resume --out {folder}\n")
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(runner, "_prepare_teacher", stop)
    code, _, err = ucc("search", "space.yaml", "--out", str(tmp_path / "never"))
    assert code == 130
    assert "nothing was written" in err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("baselines", [False, True], ids=["nothing worked", "baselines worked"])
def test_a_search_that_failed_as_a_whole_ends_in_1_and_says_how(baselines, ucc, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "from ucc_search import Scorer, hookimpl\n"
        "class Broken(Scorer):\n"
        "    def score(self, view):\n"
        "        raise RuntimeError('boom')\n"
        "@hookimpl\n"
        "def ucc_scorers():\n"
        "    return {'broken': Broken}\n",
        encoding="utf-8",
    )
    options = ("--plugin", str(plugin), "--set", "space.scorer=broken", "--budget", "macs=50%")
    fixed = ("--set", "baselines=[{name: fixed}]") if baselines else ()
    code, out, err = ucc("search", "space.yaml", "--out", str(tmp_path / "run"), *options, *fixed)
    assert code == 1
    assert ("No usable trial yet" in out) is not baselines
    assert "RuntimeError: boom" in out
    sentence = "error: every trial of the search failed on the zero-shot rung (4), all with error; trial "
    assert err.startswith(sentence)
    assert "RuntimeError: boom" in err
    assert "another --out" in err
    assert err.count("\n") == 1


# What comes out


def test_json_of_plan_is_the_plan(ucc):
    code, out, err = ucc("plan", "space.yaml", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [b["label"] for b in found["budgets"]] == ["macs=70%", "macs=50%"]
    reach = found["reachable"]["search"]
    assert reach["min_macs"] < found["budgets"][1]["max_macs"] < found["dense"]["macs"]


def test_json_of_analyze_and_pick_agree(ucc):
    code, out, _ = ucc("analyze", "run", "--json")
    front = json.loads(out)["front"]
    assert code == 0
    assert front
    cheapest = front[0]
    code, out, _ = ucc("pick", "run", "--max-macs", str(cheapest["macs"]), "--json")
    assert code == 0
    assert json.loads(out)["id"] == cheapest["id"]


def test_json_of_the_other_commands_parses(ucc):
    for arguments in (("plugins", "list"), ("models", "inspect", "deit_tiny_patch16_224")):
        code, out, _ = ucc(*arguments, "--json")
        assert code == 0
        assert json.loads(out)


def test_the_analysis_next_line_works_as_it_stands(ucc):
    """People paste it."""
    _, out, _ = ucc("analyze", "run")
    command = re.search(r"^Next: ucc-search (.*)$", out, re.MULTILINE)
    assert command
    code, out, _ = ucc(*command[1].split())
    assert code == 0
    assert out.startswith("trial ")


def test_the_picked_model_loads_as_pick_says(home, ucc, monkeypatch):
    import ucc_search

    _, out, _ = ucc("pick", "run")
    folder = re.search(r"load_model\('(.*)'\)", out)
    assert folder
    monkeypatch.chdir(home)
    model = ucc_search.load_model(folder[1])
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_piped_output_has_no_escape_codes(home):
    for arguments in (
        ("analyze", "run"),
        ("pick", "run"),
        ("plan", "space.yaml"),
        ("plugins", "list"),
        ("--help",),
    ):
        done = in_shell(home, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert ESCAPE not in done.stdout + done.stderr


# Light commands


LIGHT = {
    "help": ("--help",),
    "plan": ("plan", "space.yaml"),
    "plugins list": ("plugins", "list"),
    "analyze help": ("analyze", "--help"),
}


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_import_nothing_heavy(command, home):
    """Once a first run has cached the model's shape; the first `plan` of a model must build it."""
    done = in_shell(home, *LIGHT[command], flags=("-X", "importtime"))
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "ucc_search.cli" in loaded, "importtime reported nothing"
    assert not loaded & {"torch", "timm", "ray", "optuna", "deepspeed", "pandas", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_answer_within_a_second(command, home):
    def seconds() -> float:
        start = time.perf_counter()
        assert in_shell(home, *LIGHT[command]).returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 1.0


def test_a_named_plugin_that_fails_is_warned_about(ucc, tmp_path):
    plugin = tmp_path / "gone.py"
    plugin.write_text("import nothing_here\n")
    code, out, err = ucc("plan", "space.yaml", "--plugin", str(plugin), "--json")
    assert code == 0 and json.loads(out)
    assert "warning: plugin 'gone'" in err and "nothing_here" in err
