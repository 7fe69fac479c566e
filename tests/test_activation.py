"""`wkv activate` in an environment of its own: programs that never import wkv know its classes afterwards.

The environment is a throw-away one that finds the packages of the running one, which stays as it is.
"""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, wkv
from conftest import busy_model
from transformers import AutoModelForCausalLM

from wkv import activation
from wkv.vocabulary import build_tokenizer

WKV = "import sys; from wkv.cli import main; sys.exit(main())"
# Nothing of wkv is named but by what transformers then answers.
KNOWN = """
import sys
assert not {"wkv", "torch", "transformers", "warnings"} & sys.modules.keys()
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for name in ("rwkv", "rwkv5", "rwkv6", "rwkv7"):
    config = AutoConfig.for_model(name, hidden_size=64, num_hidden_layers=1, vocab_size=50)
    assert type(AutoModelForCausalLM.from_config(config)).__module__.startswith("wkv."), name
import peft.utils.constants as constants
assert "rwkv6" in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""
COST = """
import sys, time
line = open(sys.argv[1]).read()
before = set(sys.modules)
start = time.process_time()
exec(line)
print(time.process_time() - start)
assert set(sys.modules) == before
"""


class Environment:
    """A virtual environment, where nothing but packages of the running one is installed."""

    def __init__(self, folder: Path, packages: bool = True):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        self.file = self.packages / activation.NAME
        if packages:
            theirs = Path(sysconfig.get_path("purelib"))
            lines = [file.read_text() for file in sorted(theirs.glob("*.pth")) if file.name != activation.NAME]
            (self.packages / "_theirs.pth").write_text("\n".join([str(theirs), *lines]))

    def run(self, *arguments, **variables) -> subprocess.CompletedProcess:
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        line, variables = list(map(str, [self.python, *arguments])), os.environ | offline | variables
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=variables)

    def wkv(self, *arguments) -> subprocess.CompletedProcess:
        return self.run("-c", WKV, *arguments)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    """An activated environment."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    result = made.wkv("activate")
    assert result.returncode == 0, result.stderr
    # It says what it did, to what, and how to undo it.
    assert str(made.file) in result.stdout and "`wkv deactivate`" in result.stdout
    return made


@pytest.fixture
def bare(tmp_path) -> Environment:
    """An environment with nothing but the start-up file, as after `pip uninstall wkv`."""
    made = Environment(tmp_path / "bare", packages=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "_folders", lambda: [made.packages])
        assert activation.activate() == made.file
    return made


def test_auto_classes_know_every_generation_without_an_import(environment):
    result = environment.run("-c", KNOWN)
    assert result.returncode == 0 and str(environment.file) not in result.stderr, result.stderr


def test_start_up_costs_less_than_5_ms_and_imports_nothing(environment):
    """The file's line by itself, first time in a process: processor seconds, of which the least is the cost."""
    runs = [environment.run("-S", "-c", COST, environment.file) for _ in range(5)]
    assert [run.stderr for run in runs] == [""] * 5
    assert min(float(run.stdout) for run in runs) < 0.005


@pytest.mark.parametrize("broken", [None, "raise RuntimeError('broken')", "def"])
def test_start_up_survives_a_missing_or_broken_package(bare, broken, tmp_path):
    """Only who imports transformers hears of it, in one line that names the file."""
    if broken:
        (bare.packages / "wkv.py").write_text(broken)
    result = bare.run("-c", "print('started')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "started\n", "")
    (bare.packages / "transformers.py").write_text("print('transformers')")
    result = bare.run("-c", "import transformers")
    assert (result.returncode, result.stdout) == (0, "transformers\n"), result.stderr
    assert result.stderr.count("delete it if wkv is gone") == 1 and str(bare.file) in result.stderr
    assert bare.run("-W", "error", "-c", "import transformers").returncode == 0


def test_activating_and_deactivating_twice(tmp_path):
    environment = Environment(tmp_path / "environment")
    for _ in range(2):
        assert environment.wkv("activate").returncode == 0
    assert [path.name for path in environment.packages.glob("wkv*")] == [activation.NAME]
    assert str(environment.file) in environment.wkv("deactivate").stdout
    assert not environment.file.exists()
    again = environment.wkv("deactivate")
    assert (again.returncode, again.stdout) == (0, "nothing to undo: this environment is not activated\n")


def test_info_tells_whether_it_is_active(monkeypatch, tmp_path):
    monkeypatch.setattr(activation, "_folders", lambda: [tmp_path])
    assert "activated no" in " ".join(wkv("info").stdout.split())
    file = activation.activate()
    assert str(file) in "".join(wkv("info").stdout.split())


def test_a_place_that_cannot_be_written_to_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(activation, "_folders", lambda: [tmp_path / "file" / "a", tmp_path / "file" / "b"])
    assert_refused(wkv("activate"), str(tmp_path / "file" / "a"), str(tmp_path / "file" / "b"), "virtual environment")
    assert wkv("deactivate").returncode == 0


def test_who_cannot_write_for_all_activates_for_himself(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(activation.sysconfig, "get_path", lambda name: str(tmp_path / "file" / name))
    monkeypatch.setattr(activation.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(activation.site, "getusersitepackages", lambda: str(tmp_path / "user" / "site"))
    assert activation.activate() == tmp_path / "user" / "site" / activation.NAME
    assert activation.deactivate() and not activation.active()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a command line of trl trains on: folders of tiny models and files of rows."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("rwkv", "rwkv7"):
        busy_model(name, vocab_size=320).save_pretrained(folder / name)
        build_tokenizer(pieces=[b" the", b"\n\n", b"User"]).save_pretrained(folder / name)
    rows = {
        "sft": [{"text": f"The cat {i} sat on the mat."} for i in range(8)],
        "dpo": [{"prompt": f"Hello {i}?", "chosen": " Good day.", "rejected": " No."} for i in range(8)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(name: str) -> Path:
    """An installed command, to be run by another environment's Python."""
    return Path(sysconfig.get_path("scripts")) / name


TRL = [command("trl")]
LAUNCH = [command("accelerate"), "launch", "--cpu", "--num_processes", "1", "-m"]


@pytest.mark.parametrize(
    ("line", "method", "model_type"),
    [
        pytest.param([*TRL, "sft"], "sft", "rwkv7", id="trl-sft-rwkv7"),
        pytest.param([*TRL, "dpo"], "dpo", "rwkv", id="trl-dpo-rwkv"),
        pytest.param([*TRL, "sft"], "sft", "rwkv", id="trl-sft-rwkv", marks=pytest.mark.slow),
        pytest.param([*TRL, "dpo"], "dpo", "rwkv7", id="trl-dpo-rwkv7", marks=pytest.mark.slow),
        pytest.param([*LAUNCH, "trl.scripts.dpo"], "dpo", "rwkv7", id="accelerate-dpo-rwkv7", marks=pytest.mark.slow),
    ],
)
def test_command_lines_train_our_classes(environment, trained, line, method, model_type):
    """They train to the end, and what they write is loaded again."""
    config, out = trained / "config.yaml", trained / f"{method}-{model_type}"
    settings = {
        "model_name_or_path": str(trained / model_type),
        "datasets": [{"path": "json", "data_files": str(trained / f"{method}.jsonl")}],
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    # JSON is YAML as well.
    config.write_text(json.dumps(settings))
    result = environment.run(*line, "--config", config, HF_HOME=str(trained / "cache"))
    assert result.returncode == 0, result.stderr[-3000:]
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] > 0 and log[0]["grad_norm"] > 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (trained / model_type, out))
    assert type(after) is type(before)
    assert not torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight)
