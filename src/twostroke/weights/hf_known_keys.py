"""Which keys of a config.json are known, and why each may be there.

Three lists: keys that are read, keys that are fine with one value only, and keys that cannot
change what a decoder computes: training, sampling defaults, bookkeeping of transformers.
"""

from __future__ import annotations

from typing import Any

UNDERSTOOD = frozenset(
    {
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)

MUST_EQUAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,  # weights packed by another tool
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}

HARMLESS = frozenset(
    {
        # bookkeeping
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "dtype",
        "is_decoder",
        "is_llama_config",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "cache_implementation",
        # training and classification
        "attention_dropout",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "label2id",
        "num_labels",
        "pretraining_tp",  # splits the same products; the sums are the same but for rounding
        "problem_type",
        "pruned_heads",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        # tokens and defaults of generation, which requests set for themselves
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)

# Keys of a multimodal gemma3 configuration around its text_config.
GEMMA3_OUTER = frozenset(
    {
        "model_type",
        "text_config",
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "boi_token_id",
        "eoi_token_id",
        "image_token_id",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    }
)
