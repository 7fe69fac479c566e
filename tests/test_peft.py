"""Every PEFT method that adapts linear layers or norms, on every generation, told nothing but its own sizes."""

import copy
from typing import NamedTuple

import peft
import pytest
import torch
from conftest import TINY, assert_close, busy_model, random_ids
from peft import PeftModel, get_peft_model
from peft.utils import constants
from peft_cases import one_by_one, train

from wkv.auto import _register_adapters
from wkv.models.rwkv_fused import HeadGroupNorm


class Method(NamedTuple):
    """A PEFT configuration, and what the method does not promise for any model.

    "base": the base model's weights stay; "modes": training computes what evaluation does; "merge" and "unmerge": there
    is a merged form, and a way back; "causal": a token sees only those before it.
    """

    config: type
    options: dict = {}
    lacks: tuple[str, ...] = ()


COMMON = {
    "lora": Method(peft.LoraConfig),
    "dora": Method(peft.LoraConfig, {"use_dora": True}),
    "rslora": Method(peft.LoraConfig, {"use_rslora": True}),
    "pissa": Method(peft.LoraConfig, {"init_lora_weights": "pissa"}, lacks=("base",)),
    "olora": Method(peft.LoraConfig, {"init_lora_weights": "olora"}, lacks=("base",)),
    "all-linear": Method(peft.LoraConfig, {"target_modules": "all-linear"}),
    "adalora": Method(peft.AdaLoraConfig, {"total_step": 20}),
    "miss": Method(peft.MissConfig, {"r": 16}),
    "oft": Method(peft.OFTConfig, {"oft_block_size": 16}),
    "boft": Method(peft.BOFTConfig, {"boft_block_size": 4}),
    "ia3": Method(peft.IA3Config),
    "loha": Method(peft.LoHaConfig),
    "lokr": Method(peft.LoKrConfig),
    "vera": Method(peft.VeraConfig),
    "hra": Method(peft.HRAConfig),
    "randlora": Method(peft.RandLoraConfig),
    "shira": Method(peft.ShiraConfig, {"r": 8}),
    "c3a": Method(peft.C3AConfig, {"block_size": 16}),
    "fourierft": Method(peft.FourierFTConfig),
    "lntuning": Method(peft.LNTuningConfig),
}
# By default on one generation only.
RARE = {
    "beft": Method(peft.BeftConfig, lacks=("merge", "unmerge")),
    "deft": Method(peft.DeftConfig),
    "delora": Method(peft.DeloraConfig),
    "frod": Method(peft.FrodConfig, {"progressbar": False}),
    "glora": Method(peft.GloraConfig),
    "gralora": Method(peft.GraloraConfig, {"r": 8}),
    "hira": Method(peft.HiraConfig),
    "kasa": Method(peft.LoraConfig, {"kasa_config": peft.KasaConfig()}, lacks=("base",)),
    "lily": Method(peft.LilyConfig, lacks=("merge", "unmerge", "causal")),
    "miss-bat": Method(peft.MissConfig, {"r": 16, "init_weights": "bat"}),
    "monteclora": Method(peft.LoraConfig, {"monteclora_config": peft.MontecloraConfig()}, lacks=("modes",)),
    "osf": Method(peft.OSFConfig, lacks=("base", "unmerge")),
    "peanut": Method(peft.PeanutConfig),
    "psoft": Method(peft.PsoftConfig),
    "pvera": Method(peft.PveraConfig, lacks=("modes",)),
    "road": Method(peft.RoadConfig, {"group_size": 16}),
    "supertuning": Method(peft.SupertuningConfig),
    "tinylora": Method(peft.TinyLoraConfig),
    "unilora": Method(peft.UniLoraConfig, {"theta_d_length": 256}),
    "vblora": Method(peft.VBLoRAConfig, {"num_vectors": 60, "vector_length": 16}),
    "velora": Method(peft.LoraConfig, {"velora_config": peft.VeloraConfig()}),
    "waveft": Method(peft.WaveFTConfig, {"n_frequency": 500}),
}
METHODS = COMMON | RARE
CASES = [
    pytest.param((t, m), id=f"{t}-{m}", marks=[pytest.mark.slow] if m in RARE and t != "rwkv7" else [])
    for t in sorted(TINY)
    for m in METHODS
]
# Whether IA3 scales what goes into a linear layer of a block, and not what comes out.
IA3_TARGETS = {
    "rwkv": {"attention.key": False, "attention.value": False, "feed_forward.value": True},
    "rwkv7": {"attn.k_proj": False, "attn.v_proj": False, "ffn.value": True},
}


class Trained(NamedTuple):
    """A model with a trained adapter, in eval mode, and what it computes for some ids with and without it."""

    method: Method
    base: torch.nn.Module
    model: PeftModel
    losses: list[float]
    plain: torch.Tensor
    logits: torch.Tensor


IDS = random_ids(2, 7)


@pytest.fixture(scope="module")
def _bases():
    return {model_type: busy_model(model_type, num_hidden_layers=2) for model_type in TINY}


@pytest.fixture(scope="module", params=CASES)
def trained(request, _bases) -> Trained:
    model_type, name = request.param
    torch.manual_seed(0)
    torch.set_num_threads(1)
    method, base = METHODS[name], _bases[model_type]
    config = method.config(task_type="CAUSAL_LM", **method.options)
    model = get_peft_model(copy.deepcopy(base), config)
    losses = train(model, IDS)
    with torch.no_grad():
        return Trained(method, base, model, losses, base(IDS).logits, model(IDS).logits)


def test_trains_the_adapter_alone(trained):
    """The loss falls, every adapter parameter has a gradient, nothing else has, and the logits move."""
    assert min(trained.losses[1:]) < trained.losses[0] - 1e-3
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[trained.model.active_peft_config.peft_type]
    for name, parameter in trained.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (prefix in name), name
    assert (trained.logits - trained.plain).abs().max() > 1e-3


@torch.no_grad()
def test_is_the_same_in_every_mode(trained):
    """In training, in evaluation, one token at a time; and the base model is there without the adapter."""
    model, lacks = trained.model, trained.method.lacks
    if "modes" not in lacks:
        with torch.enable_grad():
            assert_close(model.train()(IDS).logits, trained.logits)
    model.eval()
    if "causal" not in lacks:
        assert_close(one_by_one(model, IDS), trained.logits)
    if "base" not in lacks:
        with model.disable_adapter():
            assert_close(model(IDS).logits, trained.plain)


@torch.no_grad()
def test_is_saved_loaded_and_unloaded(trained, tmp_path):
    """The adapter comes back on another copy of the base model, and leaves a plain model when it is merged there."""
    trained.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(trained.base), tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, trained.logits)
    if "merge" not in trained.method.lacks:
        merged = loaded.merge_and_unload()
        assert_close(merged(IDS).logits, trained.logits)
        assert type(merged) is type(trained.base) and not isinstance(merged, PeftModel)
        assert merged.state_dict().keys() == trained.base.state_dict().keys()


@torch.no_grad()
def test_merges_and_unmerges(trained):
    model, lacks = trained.model, trained.method.lacks
    if "merge" in lacks:
        with pytest.raises((NotImplementedError, ValueError), match=r"not supported|no bias"):
            model.merge_adapter()
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert_close(model(IDS).logits, trained.logits)
    if "unmerge" not in lacks:
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)
        assert_close(model(IDS).logits, trained.logits)


def test_every_table_of_peft_knows_every_generation():
    """Each method has a table of its own, and a generation that is missing in one is an error for the user."""
    tables = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    assert len(tables) > 30 and all("llama" in table for table in tables.values())
    assert [name for name, table in tables.items() if not TINY.keys() <= table.keys()] == []
    linears = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    # What PEFT itself has for two of them is kept.
    assert linears["rwkv"] == ["key", "value", "receptance", "output"]
    assert linears["rwkv7"] == ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]


def test_norms_and_vectors_go_where_they_belong(model_type, _bases):
    """LNTuning on every norm; IA3 behind the time-mix's keys and values and before the channel-mix's last matrix."""
    base = _bases[model_type]
    tuned = get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    found = {n.removeprefix("base_model.model.") for n, m in tuned.named_modules() if hasattr(m, "ln_tuning_layers")}
    assert found == {n for n, m in base.named_modules() if isinstance(m, (torch.nn.LayerNorm, HeadGroupNorm))}

    scaled = get_peft_model(copy.deepcopy(base), peft.IA3Config(task_type="CAUSAL_LM"))
    before = {n.split(".", 5)[5]: m.is_feedforward for n, m in scaled.named_modules() if hasattr(m, "is_feedforward")}
    assert before == IA3_TARGETS.get(model_type, IA3_TARGETS["rwkv"])


def test_targets_set_by_the_user_stay(monkeypatch):
    table = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "rwkv6", ["mine"])
    _register_adapters()
    assert table["rwkv6"] == ["mine"]
