"""Our models with the weights of an official checkpoint; names are written out here and trust no converter.

Letters: L layers, C width, N head size, H heads, A attention width, V vocabulary, T tokens.
"""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

# Official name inside a block of RWKV-7 -> ours, and what happens to the tensor on the way.
VECTOR, SAME, TRANSPOSED = torch.flatten, torch.clone, torch.t
RENAMES7 = {
    "ln0.": ("pre_norm.", SAME),
    "ln1.": ("attn_norm.", SAME),
    "ln2.": ("ffn_norm.", SAME),
    **{f"att.x_{letter}": (f"attn.x_{letter}", SAME) for letter in "rwkvag"},
    **{f"att.{letter}0": (f"attn.{letter}_lora.lora.2.bias", VECTOR) for letter in "wav"},
    **{f"att.{letter}1": (f"attn.{letter}_lora.lora.0.weight", TRANSPOSED) for letter in "wavg"},
    **{f"att.{letter}2": (f"attn.{letter}_lora.lora.2.weight", TRANSPOSED) for letter in "wavg"},
    "att.k_k": ("attn.k_k", VECTOR),
    "att.k_a": ("attn.k_a", VECTOR),
    "att.r_k": ("attn.r_k", SAME),
    "att.receptance.": ("attn.r_proj.", SAME),
    "att.key.": ("attn.k_proj.", SAME),
    "att.value.": ("attn.v_proj.", SAME),
    "att.output.": ("attn.o_proj.", SAME),
    "att.ln_x.": ("attn.g_norm.", SAME),
    "ffn.x_k": ("ffn.x_k", VECTOR),
    "ffn.": ("ffn.", SAME),
}
# The same for 4, 5 and 6, where tensors stay as they are and only the letters of the token shift's mixes are spelt out.
RENAMES456 = {"ln0.": "pre_ln.", "att.": "attention.", "ffn.": "feed_forward."}
SPELT = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
OUTER = {"emb.": "embeddings.", "ln_out.": "ln_out."}


def our_weights(weights: dict) -> dict:
    """The official dict under our names."""
    return _our_weights7(weights) if "blocks.0.att.r_k" in weights else _our_weights456(weights)


def _our_weights7(weights: dict) -> dict:
    ours = {
        "model.embeddings.weight": weights["emb.weight"],
        "lm_head.weight": weights["head.weight"],
        "model.norm.weight": weights["ln_out.weight"],
        "model.norm.bias": weights["ln_out.bias"],
    }
    for name, tensor in weights.items():
        if not name.startswith("blocks.") or name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")):
            continue
        _, layer, rest = name.split(".", 2)
        theirs = next(prefix for prefix in RENAMES7 if rest.startswith(prefix))
        new, change = RENAMES7[theirs]
        ours[f"model.layers.{layer}.{new}{rest[len(theirs) :]}"] = change(tensor)
    return ours


def _our_weights456(weights: dict) -> dict:
    ours = {}
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            for theirs, new in RENAMES456.items():
                if rest.startswith(theirs):
                    rest = new + rest.removeprefix(theirs)
            stem, _, letter = rest.rpartition("time_mix_")
            name = f"blocks.{layer}." + (f"{stem}time_mix_{SPELT[letter]}" if stem else rest)
        else:
            name = next((new + name.removeprefix(old) for old, new in OUTER.items() if name.startswith(old)), name)
        ours[name if name.startswith("head.") else f"rwkv.{name}"] = tensor
    return ours


def our_config(weights: dict, **changes):
    """The configuration that the shapes and names of an official dict tell."""
    V, C = weights["emb.weight"].shape
    A = weights["blocks.0.att.key.weight"].shape[0]
    fields = {
        "vocab_size": V,
        "hidden_size": C,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "attention_hidden_size": A,
        "intermediate_size": weights["blocks.0.ffn.key.weight"].shape[0],
    }
    att = {name.removeprefix("blocks.0.att."): t for name, t in weights.items() if name.startswith("blocks.0.att.")}
    if "r_k" in att:
        kind = "rwkv7"
        fields |= {
            "head_dim": att["r_k"].shape[1],
            "decay_low_rank_dim": att["w1"].shape[1],
            "a_low_rank_dim": att["a1"].shape[1],
            "v_low_rank_dim": weights["blocks.1.att.v1"].shape[1] if "blocks.1.att.v1" in weights else None,
            "gate_low_rank_dim": att["g1"].shape[1],
        }
    elif "time_maa_x" in att:
        kind = "rwkv6"
        fields |= {
            "head_size": att["time_faaaa"].shape[1],
            "time_mix_extra_dim": att["time_maa_w2"].shape[1],
            "time_decay_extra_dim": att["time_decay_w1"].shape[1],
        }
    elif "ln_x.weight" in att:
        kind = "rwkv5"
        fields |= {
            "head_size": A // len(att["time_decay"]),
            "use_gate": "gate.weight" in att,
            "decay_per_head": att["time_decay"].ndim == 1,
            "bonus_is_log": "time_first" in att,
        }
    else:
        kind = "rwkv"
    return AutoConfig.for_model(kind, **fields | changes)


def our_model(weights: dict, dtype=torch.float32, **changes):
    """Our model in eval mode; `changes` are configuration fields."""
    model = AutoModelForCausalLM.from_config(our_config(weights, **changes), dtype=dtype).eval()
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in our_weights(weights).items()}, strict=True)
    return model


def run(model, ids: Sequence[int], slices: Sequence[int], cache=None):
    """Logits (T, V) over slices of the given lengths, and the cache."""
    logits = []
    with torch.no_grad():
        for piece in torch.tensor(ids)[None].split(list(slices), 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
    return torch.cat(logits), cache


def state_of(cache) -> list[torch.Tensor]:
    """Our cache as a list of three a layer: attention shift (C), WKV state, channel-mix shift (C)."""
    return [
        t[0].float()
        for layer in cache.layers
        for t in (layer.conv_states[0].squeeze(-1), layer.recurrent_states[0], layer.conv_states[1].squeeze(-1))
    ]


def cache_of(model, state: Sequence[torch.Tensor]) -> DynamicCache:
    """The opposite of `state_of`."""
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        shift, wkv, ffn_shift = state[3 * layer : 3 * layer + 3]
        cache.update_conv_state(shift[None, :, None], layer, state_idx=0, conv_kernel_size=1)
        cache.update_conv_state(ffn_shift[None, :, None], layer, state_idx=1, conv_kernel_size=1)
        cache.update_recurrent_state(wkv[None].contiguous(), layer)
    return cache
