"""GGUF files against llama.cpp itself, built from the source package of `llama-cpp-python` as the bench builds it.

It runs what we write, we read what its converter and its quantisation make, and both cut texts into the same tokens.
"""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_cases import assert_identical, is_wide, lazy, read
from oracle.official import random_official
from transformers import AutoModelForCausalLM, AutoTokenizer

from wkv.checkpoints import convert
from wkv.gguf_files import write_gguf
from wkv.vocabulary import build_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import bench
import bench_llama_cpp

pytestmark = pytest.mark.slow

V = 300
# Its converter takes these ranks of RWKV-6 for granted; more than six blocks, so that it halves matrices.
SHAPES = {"6": dict(L=8, ranks=(32, 64)), "7": dict(L=3, ranks=(32, 64, 96, 128))}
PIECES = [b"\n\n", b" hello", b"'\"\\x4", "é".encode(), b"\xff\x00\t", b"<s"]


@pytest.fixture(scope="module", autouse=True)
def llama_cpp():
    """A build of llama.cpp, made now if there is none."""
    before = dict(os.environ)
    bench.CACHE.mkdir(parents=True, exist_ok=True)
    try:
        bench_llama_cpp.build(bench.CACHE, print)
    except bench_llama_cpp.MissingError as error:
        pytest.skip(f"llama.cpp: {error}")
    llama = bench_llama_cpp.load(bench.CACHE)
    # Outlives every test: the library keeps a pointer to it.
    llama.quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(llama.quiet, None)
    yield llama
    os.environ.clear()
    os.environ.update(before)


def weights(version: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint with heads of 64 channels, as llama.cpp has them, and logits of scale 5."""
    drawn = random_official(version, C=128, N=64, V=V, **SHAPES[version])
    drawn["head.weight"] *= 2.5
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}


def run(llama, path: Path, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits at every position (T, V)."""
    runner = bench_llama_cpp.LlamaCpp(bench.CACHE, path, V, 1)
    llama.llama_log_set(llama.quiet, None)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama.llama_decode(runner.context, batch) == 0
    rows = ctypes.cast(llama.llama_get_logits(runner.context), ctypes.POINTER(ctypes.c_float))
    return torch.from_numpy(np.ctypeslib.as_array(rows, (len(ids), V)).copy())


# In the two others llama.cpp rounds activations too.
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-2), ("float16", 3e-2), ("bfloat16", 5e-1)])
@pytest.mark.parametrize("version", SHAPES)
def test_llama_cpp_scores_as_we_do(version, dtype, allowed, llama_cpp, tmp_path):
    torch.save(weights(version, getattr(torch, dtype)), tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "model.gguf", to="gguf", tokenizer=False)
    ids = torch.randint(1, 256, (1, 256), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        ours = model(ids).logits[0]
    theirs = run(llama_cpp, tmp_path / "model.gguf", ids[0].tolist())
    print(f"RWKV-{version} {dtype}: logits of scale {ours.std():.1f} differ by {(theirs - ours).abs().max():.2g}")
    assert 3 < ours.std() < 8
    torch.testing.assert_close(theirs, ours, atol=allowed, rtol=0)


@pytest.mark.parametrize("version", SHAPES)
def test_what_its_converter_writes_reads_back(version, tmp_path):
    expected = weights(version)
    torch.save(expected, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hub", tokenizer=False)
    bench_llama_cpp.convert(bench.CACHE, tmp_path / "hub", "float32", V, print)
    gguf = bench_llama_cpp.gguf_path(tmp_path / "hub", "float32")
    assert_identical(read(gguf), expected)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name)
    assert_identical(theirs.state_dict(), ours.state_dict())
    convert(gguf, tmp_path / "back.pth", to="pth")
    assert_identical(torch.load(tmp_path / "back.pth"), expected)


@pytest.mark.parametrize("version", SHAPES)
def test_its_quantised_files_are_read(version, llama_cpp, tmp_path):
    expected = weights(version)
    write_gguf(tmp_path / "model.gguf", version, lazy(expected))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    source, quantised = (str(tmp_path / name).encode() for name in ("model.gguf", "q8.gguf"))
    assert llama_cpp.llama_model_quantize(source, quantised, ctypes.byref(parameters)) == 0
    found = read(tmp_path / "q8.gguf")
    wide = {name for name in expected if is_wide(name)}
    assert_identical(*({name: t for name, t in some.items() if name not in wide} for some in (found, expected)))
    for name in wide:
        blocks, meant = (some[name].reshape(-1, 32) for some in (found, expected))
        # Half a step, and the rounding of the step to float16.
        allowed = meant.abs().amax(1, keepdim=True) / 127 * 0.57
        assert (blocks - meant).abs().le(allowed).all() and not torch.equal(blocks, meant), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q8.gguf")
    head = model.get_output_embeddings().weight
    assert model.dtype == torch.float32 and torch.equal(head, found["head.weight"])


def test_both_cut_texts_alike(llama_cpp, tmp_path):
    tokenizer = build_tokenizer(pieces=PIECES)
    write_gguf(tmp_path / "model.gguf", "7", lazy(weights("7")), tokenizer)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(tmp_path / "model.gguf").encode(), parameters)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    assert llama_cpp.llama_vocab_n_tokens(vocabulary) == V
    assert llama_cpp.llama_vocab_eot(vocabulary) == 257 and llama_cpp.llama_vocab_eos(vocabulary) == 0
    ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("User: hello\n\nAssistant: <s> é'\"\\x4", "".join(map(chr, range(1, 1500)))):
        data, ids = text.encode(), (llama_cpp.llama_token * 5000)()
        count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, 5000, True, True)
        assert list(ids[:count]) == ours(text)["input_ids"]
    llama_cpp.llama_model_free(model)
