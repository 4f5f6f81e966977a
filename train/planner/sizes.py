"""Models that can be planned for by name, as their config.json has them: only sizes, no files.

LLaMA: Touvron et al. 2023 (arXiv:2302.13971), table 2. T5: Raffel et al. 2020 (arXiv:1910.10683), section 3.7, and the
v1.1 checkpoints that followed, which gate the feed-forward and have a head of their own. RoBERTa: Liu et al. 2019
(arXiv:1907.11692). SmolLM2: its released config.
"""

from typing import Any

Raw = dict[str, Any]


def llama(hidden: int, inner: int, layers: int, heads: int) -> Raw:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }


def t5(width: int, channels: int, inner: int, layers: int, heads: int, gated: bool = False) -> Raw:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": channels,
        "d_ff": inner,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated,
    }


def roberta(hidden: int, inner: int, layers: int, heads: int) -> Raw:
    return {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }


SIZES: dict[str, Raw] = {
    "llama-7b": llama(4096, 11008, 32, 32),
    "llama-13b": llama(5120, 13824, 40, 40),
    "llama-33b": llama(6656, 17920, 60, 52),
    "llama-65b": llama(8192, 22016, 80, 64),
    "t5-small": t5(512, 64, 2048, 6, 8),
    "t5-base": t5(768, 64, 3072, 12, 12),
    "t5-large": t5(1024, 64, 4096, 24, 16),
    "t5-3b": t5(1024, 128, 16384, 24, 32),
    "t5-11b": t5(1024, 128, 65536, 24, 128),
    "t5-v1.1-small": t5(512, 64, 1024, 8, 6, gated=True),
    "t5-v1.1-base": t5(768, 64, 2048, 12, 12, gated=True),
    "t5-v1.1-large": t5(1024, 64, 2816, 24, 16, gated=True),
    "t5-v1.1-xl": t5(2048, 64, 5120, 24, 32, gated=True),
    "t5-v1.1-xxl": t5(4096, 64, 10240, 24, 64, gated=True),
    "roberta-base": roberta(768, 3072, 12, 12),
    "roberta-large": roberta(1024, 4096, 24, 16),
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
    },
}
