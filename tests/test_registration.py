"""Registration with transformers: whichever of the two is imported first, and by whichever door, the auto classes know
every generation afterwards.

What is already imported decides, so every case needs a fresh interpreter: a copy (a fork) of one that has loaded what
is slow to import and does not matter here.
"""

import json
import subprocess
import sys

# What people import of transformers first.
DOORS = {
    "a-model": "from transformers import LlamaForCausalLM",
    "modeling_layers": "import transformers.modeling_layers",
    "modeling_utils": "import transformers.modeling_utils",
    "GenerationMixin": "from transformers import GenerationMixin",
    "Trainer": "from transformers import Trainer",
    "pipeline": "from transformers import pipeline",
    "AutoConfig": "from transformers import AutoConfig",
    "AutoTokenizer": "from transformers import AutoTokenizer",
    "AutoModelForCausalLM": "from transformers import AutoModelForCausalLM",
    "peft": "import peft",
}
CASES = {
    **{f"wkv-then-{name}": f"import wkv\n{door}" for name, door in DOORS.items()},
    **{f"{name}-then-wkv": f"{door}\nimport wkv" for name, door in DOORS.items()},
    "model-classes": "from wkv.models.modeling_rwkv7 import RWKV7ForCausalLM",
    "blocks": "from wkv.models.rwkv_blocks import RwkvBlock",
    "tokenizer-class": "from wkv.models.tokenization_rwkv import RwkvTokenizer",
    "configuration-class": "from wkv.models.configuration_rwkv7 import Rwkv7Config",
    "checkpoints": "from wkv.checkpoints import convert",
    "gguf": "from wkv.gguf_files import read_gguf",
    "wkv-then-gguf": "import wkv\nimport transformers.integrations.gguf.gguf_conversion_mapping",
    "loading": "import wkv.loading",
}
# Run after each case: what a user of the auto classes gets for every model type.
CHECK = """
import transformers
from wkv.auto import GENERATIONS
for model_type, names in GENERATIONS.items():
    config = transformers.AutoConfig.for_model(model_type)
    got = [type(config).__name__]
    for auto_class in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        got.append(getattr(transformers, auto_class)._model_mapping[type(config)].__name__)
    assert got == [name.partition(".")[2] for name in names], got
    tokenizer = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING[type(config)]
    assert "RwkvTokenizer" in str(tokenizer), tokenizer
for part, name in {"config": "CONFIG_ARCHS", "conversion": "ARCHS", "tokenizer": "TOKENIZER_TYPES"}.items():
    mapping = __import__("importlib").import_module(f"transformers.integrations.gguf.gguf_{part}_mapping")
    wanted = {"rwkv"} if part == "tokenizer" else {"rwkv6", "rwkv7"}
    assert wanted <= vars(mapping)[f"GGUF_{name}"].keys(), (part, vars(mapping)[f"GGUF_{name}"].keys())
"""
# Nothing of transformers that a case could be about is imported before the fork.
PARENT = """
import gc, json, os, sys, traceback
import accelerate, huggingface_hub, jinja2, numpy, PIL.ImageOps, psutil, safetensors.torch, tokenizers
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.elastic.agent.server, torch.distributed.tensor
import torch.nn.attention.flex_attention, torch.onnx, transformers.models
assert not any(name.startswith(("wkv", "transformers.models.", "transformers.modeling")) for name in sys.modules)
gc.disable()
cases, check = json.load(sys.stdin)
for name, code in cases.items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        message = ""
        try:
            exec(code + check, {})
        except BaseException:
            message = traceback.format_exc()
        os.write(writer, message[-2000:].encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as stream:
        print(json.dumps([name, stream.read()]))
"""
CHEAP = """
import sys, time
import transformers
start = time.process_time()
import wkv
seconds = time.process_time() - start
heavy = [name for name in sys.modules if name.startswith(("torch", "transformers.model", "wkv_kernels"))]
assert heavy == [], heavy
assert seconds < 0.1, seconds
from transformers import LlamaForCausalLM
assert "wkv.models.modeling_rwkv7" in sys.modules
"""
REPLACES = """
import logging
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append((record.levelname, record.getMessage()))
logging.getLogger("wkv").addHandler(handler)
logging.getLogger("wkv").setLevel(logging.INFO)
import wkv
assert said == [], said
from transformers import AutoConfig, AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM
wkv.register()
config = AutoConfig.for_model("rwkv", hidden_size=64, num_hidden_layers=2, vocab_size=50)
assert type(config) is not RwkvConfig and type(AutoModelForCausalLM.from_config(config)) is not RwkvForCausalLM
assert type(RwkvForCausalLM(RwkvConfig(hidden_size=64, num_hidden_layers=2, vocab_size=50))) is RwkvForCausalLM
assert [(level, "`rwkv`" in message) for level, message in said] == [("INFO", True)], said
"""


def run(code: str, **options) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_order_of_imports_registers(subtests):
    lines = run(PARENT, input=json.dumps([CASES, CHECK])).splitlines()
    failures = dict(map(json.loads, lines))
    assert failures.keys() == CASES.keys()
    for name, failure in failures.items():
        with subtests.test(name):
            assert not failure, failure


def test_importing_wkv_is_cheap():
    """In a process of its own, without the parent's preparations: no torch, no model, and less than 0.1 s."""
    run(CHEAP)


def test_taking_over_the_native_class_is_said_once():
    """At level INFO; transformers' own class stays what it is for those who name it."""
    run(REPLACES)


def test_registering_again_is_harmless():
    from transformers import AutoConfig, AutoModelForCausalLM

    import wkv

    config = AutoConfig.for_model("rwkv7")
    before = AutoModelForCausalLM._model_mapping[type(config)]
    wkv.register()
    assert AutoModelForCausalLM._model_mapping[type(config)] is before
