"""A dense Llama as a GGUF file with Q8_0 or Q4_0 weights, for llama.cpp: a peer for benchmarks.

llama.cpp's own converter is no package; the codes are those of its Python package `gguf`, which is asked for by name
where it is missing. Both kinds have blocks of 32 weights with a 16-bit scale. Norms stay in 32 bits. Token embeddings
and head are Q8_0 in both: llama.cpp gives them more bits in a Q4_0 file too (Q6_K where rows are whole blocks of 256,
which the package cannot write, else Q8_0).

What is converted is closed: `LlamaForCausalLM` without biases and with plain rotary positions, and a byte-level BPE
tokenizer that cuts words by rules which llama.cpp has a name for. Anything else is refused in one line.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgen.core.checkpoint import iterate_tensors, read_headers
from maskgen.core.errors import clip
from maskgen.core.files import read_json, temporary_sibling
from sparse_serve.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

KINDS = ("q8_0", "q4_0")

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_FILE_TYPES = {"q8_0": 7, "q4_0": 2}
"""llama.cpp's numbers for files whose weights are mostly of a kind."""


def check_installed() -> None:
    """`UnsupportedError` without the package that writes such files."""
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedError("gguf is not installed; pip install 'sparse-serve[gguf]' (or: pip install gguf)")


def write(model_dir: Path, out: Path, kind: str) -> None:
    """Write `out`, the dense model of `model_dir` with weights of one of `KINDS`.

    Raises `UnsupportedError` for a model that is not converted, and `FormatError` for a directory that is damaged.
    """
    check_installed()
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config = read_json(model_dir / "config.json")
    tokenizer = _tokenizer(model_dir)
    check(config)
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every file
    types = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
    with temporary_sibling(out) as part:
        writer = GGUFWriter(part, "llama")
        _add_sizes(writer, config, _FILE_TYPES[kind])
        _add_tokenizer(writer, config, tokenizer)
        for name, tensor in iterate_tensors(read_headers(model_dir)):
            values = ordered(tensor.float().numpy(), config, name)
            target = tensor_name(name)
            if values.ndim == 1:
                writer.add_tensor(target, values)
                continue
            stored = types[kind] if target.startswith("blk.") else types["q8_0"]
            writer.add_tensor(target, quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check(config: Mapping[str, Any]) -> None:
    """`UnsupportedError` unless `write` converts a model with this `config.json`."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    facts = {
        "architectures": (config.get("architectures"), ["LlamaForCausalLM"]),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_type": (rotary.get("rope_type", "default"), "default"),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise UnsupportedError(f"{name} of config.json is {clip(found)}; only {expected} is converted to GGUF")
    sizes = [config["hidden_size"], config["intermediate_size"], _head(config) * config["num_attention_heads"]]
    if any(size % 32 for size in sizes):
        raise UnsupportedError(f"rows of {sizes} weights; GGUF's blocks are of 32")


def tensor_name(name: str) -> str:
    """llama.cpp's name of a tensor. `UnsupportedError` for one that a Llama does not have."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    parts = module.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in _BLOCK:
        return f"blk.{parts[2]}.{_BLOCK[parts[3]]}.{kind}"
    raise UnsupportedError(f"tensor {clip(name)}: not one of a Llama, and not converted to GGUF")


def ordered(values: np.ndarray, config: Mapping[str, Any], name: str) -> np.ndarray:
    """Rows as llama.cpp has them: of queries and keys, those that are rotated together become neighbours."""
    heads = {
        "self_attn.q_proj.weight": config["num_attention_heads"],
        "self_attn.k_proj.weight": config.get("num_key_value_heads", config["num_attention_heads"]),
    }.get(".".join(name.split(".")[-3:]))
    if heads is None:
        return values
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def words(pre_tokenizer: Any) -> str:
    """llama.cpp's name of the rules by which a `tokenizer.json` cuts words. `UnsupportedError` if it has none."""
    rules = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    match [(rule.get("type"), rule) for rule in rules if isinstance(rule, dict)]:
        case [("ByteLevel", level)] if level.get("use_regex", True) and not level["add_prefix_space"]:
            return "gpt-2"
        case [("Digits", digits), ("ByteLevel", level)] if digits["individual_digits"] and level.get("use_regex", True):
            return "smollm"
        case [("Split", split), ("ByteLevel", level)] if not level.get("use_regex", True):
            pattern = str(split["pattern"].get("Regex"))
            if r"\p{N}{1,3}" in pattern:
                return "llama-bpe"
            if r"|\p{N}|" in pattern:
                return "qwen2"
    raise UnsupportedError(f"tokenizer.json cuts words by rules without a name in llama.cpp: {clip(pre_tokenizer)}")


def _head(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_sizes(writer: GGUFWriter, config: Mapping[str, Any], file_type: int) -> None:
    rotary = config.get("rope_parameters") or {}
    writer.add_file_type(file_type)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_rope_dimension_count(_head(config))
    writer.add_rope_freq_base(rotary.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _tokenizer(model_dir: Path) -> dict[str, Any]:
    """What `tokenizer.json` says. `UnsupportedError` unless it is a byte-level BPE."""
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedError(f"{model_dir} has no tokenizer.json; only tokenizers with one are converted to GGUF")
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if found["model"]["type"] != "BPE":
        raise UnsupportedError(f"a tokenizer of type {clip(found['model']['type'])}; only BPE is converted to GGUF")
    words(found["pre_tokenizer"])
    return found


def _add_tokenizer(writer: GGUFWriter, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    from gguf import TokenType

    size = config["vocab_size"]
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    around = (tokenizer.get("post_processor") or {}).get("single", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words(tokenizer["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token("SpecialToken" in (around[0] if around else {}))
    for name, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        found = config.get(name)
        number = found[0] if isinstance(found, list) else found
        if number is not None:
            add(number)
