"""Tiny values for the fields of transformers' configs, by name, and corrections for some types.

A value of 0-d stands for a scalar field, and for each element of a field that is a list of any
length; a list is for a field with one value for each stage of the model, and is cut to the length
of the default.
"""

from __future__ import annotations

from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 48, 4, 2, 8, 2
VOCAB, POSITIONS, IMAGE, PATCH = 99, 128, 32, 8

_GROUPS: tuple[tuple[Any, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model n_embd dim embed_dim emb_dim hidden_dim embedding_size embedding_dim "
        "word_embed_proj_dim output_hidden_size out_hidden_size projection_dim output_dim "
        "text_hidden_size image_text_hidden_size encoder_hidden_size decoder_hidden_size "
        "projector_hidden_size cross_attention_hidden_size hidden_size_global neck_hidden_size "
        "input_embedding_size output_embedding_size d_latents pooler_output_size lru_width "
        "attention_hidden_size patch_embed_hidden_size vision_output_dim prediction_head_size "
        "classifier_proj_size codevector_dim proj_codevector_dim backbone_hidden_size "
        "image_token_embed_dim mm_embed_dim output_proj_dims adapter_out_dim resnet_dim "
        "sequence_dim sequence_state_dim audio_embed_dim projection_hidden_dim stem_out_channels "
        "projection_hidden_size nemo_conv_channels depthwise_separable_out_channel "
        "ext_pw_out_channel router_hidden_size attention_rnn_dim aspp_out_channels entity_emb_size "
        "xpath_hidden_size downsample_hidden_size vision_hidden_size "
        "projection_size prompt_mid_dim density_router_hidden_size latent_dim "
        "projector_output_dim projector_input_dim subsampling_conv_channels",
    ),
    (
        INTERMEDIATE,
        "intermediate_size ffn_dim d_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim "
        "ffn_hidden_size feed_forward_size mlp_dim dff dim_ff expert_ffn_hidden_size "
        "dense_intermediate_size prefix_dense_intermediate_size speech_encoder_intermediate_size "
        "intermediate_size_mlp decoder_intermediate_size alignment_intermediate_size "
        "projection_intermediate_size",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
        "share_expert_dim",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "attention_heads num_self_attention_heads num_cross_attention_heads "
        "speech_encoder_attention_heads conf_num_attention_heads swa_num_attention_heads "
        "resampler_n_heads resampler_heads num_heads_ipa decoder_num_heads "
        "num_sliding_attention_heads decoder_num_attention_heads",
    ),
    (KV_HEADS, "num_key_value_heads swa_num_key_value_heads num_kv_heads"),
    (
        HEAD_DIM,
        "head_dim d_kv v_head_dim qk_nope_head_dim swa_head_dim attention_head_size "
        "global_head_dim kv_channels "
        "index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim d_head "
        "resampler_head_dim dim_head resampler_dim_head attention_head_dim mamba_head_dim "
        "sequence_head_width pairwise_head_width ipa_dim qk_head_dim",
    ),
    (4, "qk_rope_head_dim index_n_heads rotary_dim"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank mamba_d_state state_size ssm_state_size d_state"),
    (
        LAYERS,
        "num_hidden_layers num_layers n_layer n_layers layers depth encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_blocks speech_encoder_layers "
        "conf_num_hidden_layers num_global_layers num_self_attends_per_block decoder_depth "
        "resampler_depth max_window_layers decoder_num_hidden_layers",
    ),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk top_k_experts moe_k"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group"),
    (1, "first_k_dense_replace num_adapter_layers num_dense_layers"),
    (1, "decoder_sparse_step encoder_sparse_step"),
    (VOCAB, "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size audio_vocab_size"),
    (VOCAB, "vocab_size_per_layer_input entity_vocab_size mel_vocab_size unpadded_vocab_size"),
    (HEAD_DIM, "hidden_size_per_layer_input laurel_rank"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions "
        "max_encoder_position_embeddings max_decoder_position_embeddings max_seq_len "
        "max_2d_position_embeddings original_max_position_embeddings position_embedding_size "
        "context_length max_sequence_length seq_len max_pos_emb",
    ),
    (IMAGE, "image_size crop_size"),
    (PATCH, "patch_size"),
    (2, "temporal_patch_size spatial_merge_size num_frames mm_tokens_per_image"),
    (3, "num_channels"),
    (8, "chunk_size mamba_chunk_size sliding_window sliding_window_size local_attention"),
    (8, "attention_window_size attention_window attention_chunk_size"),
    (8, "embedding_size_per_layer num_conv_pos_embeddings"),
    (2, "num_conv_pos_embedding_groups"),
    (8, "num_mel_bins input_feat_size feature_size n_mel_bins"),
    (8, "relative_attention_num_buckets num_buckets"),
    (4, "mamba_n_heads n_mamba_heads mamba_num_heads"),
    (8, "coordinate_size shape_size"),
    (4, "num_query_tokens num_latents resampler_n_latents latent_query_num resampler_num_latents"),
    (8, "base_channels latent_channels"),
    (16, "num_embeddings codebook_size num_codevectors_per_group"),
    (4, "num_image_tokens image_seq_length vision_soft_tokens_per_image"),
    (8, "index_topk"),
    (16, "num_position_embeddings"),
    (4, "linear_num_value_heads linear_num_heads"),
    (2, "linear_num_key_heads"),
    (8, "output_channels auxiliary_channels"),
    (16, "channels decoder_channels"),
)
SIZES: dict[str, Any] = {name: value for value, names in _GROUPS for name in names.split()}

STAGES: dict[str, tuple[Any, ...]] = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 16, 32),
    "embed_dims": (8, 16, 16, 32),
    "num_attention_heads": (1, 2, 2, 4),
    "num_heads": (1, 2, 2, 4),
    "encoder_num_heads": (1, 2, 2, 4),
    "conv_dim": (16,) * 16,
    "conv_kernel": (10, 3, 3, 3, 2, 2, 2),
}

# Fields that are 0 where dropout, layer drop, masking and the like must not happen.
OFF = ("dropout", "pdrop", "dropout_prob", "layerdrop", "drop_path", "drop_rate", "drop_prob")
OFF_NAMES = {
    "mask_time_prob",
    "mask_feature_prob",
    "drop_path_rate",
    "drop_connect_rate",
    "dropout_rate",
    "jitter_noise",
    "router_jitter_noise",
    "moe_jitter_eps",
}

SPECIAL_IDS = {"pad": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 4, "unk": 5, "mask": 6}

# By model type: what the names alone do not settle. An entry for a part (``text_config``) is read
# with the table above as well.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_PYRAMID = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}
_GLOBAL_HEADS = {"global_head_dim": HEAD_DIM}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_SMALL_VQ = {"base_channels": 32, "channel_multiplier": (1, 1), "num_res_blocks": 1}
_CONVOLUTIONS = {"conv_dim": (16,) * 3, "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2)}
_SAM = {"downsample_channels": (16, 32), "global_attn_indexes": (1,), "window_size": 2}

CORRECTIONS: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 4, "embedding_size": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "canine": {"max_position_embeddings": POSITIONS, "num_hash_buckets": 50}
    | {"bos_token_id": 1, "eos_token_id": 2, "local_transformer_stride": 8},
    "chameleon": {"vocabulary_map": {"<image>": 98}, "vq_config": _SMALL_VQ},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "convnext": {"patch_size": 4},
    "convnextv2": {"patch_size": 4},
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "cvt": {"embed_dim": (8, 16, 32), "num_heads": (1, 2, 4), "depth": (1, 2, 3)},
    "deepseek_ocr2_sam_vision_model": _SAM | {"downsample_channels": [16, 32]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "donut-swin": _PYRAMID | {"window_size": 4, "patch_size": 4},
    "dpt": {"neck_hidden_sizes": (8, 8, 16, 16), "fusion_hidden_size": 8}
    | {"backbone_out_indices": (0, 1, 2, 3), "num_hidden_layers": 4},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "efficientnet": {
        "width_coefficient": 0.5,
        "depth_coefficient": 0.5,
        "hidden_dim": 32,
        "in_channels": (16, 8, 16),
        "out_channels": (8, 16, 16),
        "kernel_sizes": (3, 3, 3),
        "strides": (1, 2, 1),
        "num_block_repeats": (1, 1, 1),
        "expand_ratios": (1, 2, 2),
    },
    "emu3": {"vq_config": _SMALL_VQ | {"attn_resolutions": ()}, "vocabulary_map": {"<image>": 98}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], "rope_parameters": _MROPE},
    "esmc": {"num_key_value_heads": HEADS},
    "evolla": {"aligner_num_add_layers": 1},
    "SaProtProteinEncoder": {"position_embedding_type": "rotary"},
    "florence_vision": {"patch_size": (7, 3, 3, 3), "embed_dim": (8, 16, 16, 32)}
    | {"num_heads": (1, 2, 2, 4), "num_groups": (1, 2, 2, 4), "window_size": 4},
    "focalnet": {"embed_dim": 16, "depths": (1, 1), "hidden_sizes": (16, 32), "patch_size": 4}
    | {"focal_levels": (2, 2), "focal_windows": (3, 3)},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        | {"num_kv_shared_layers": LAYERS}
        | _GLOBAL_HEADS
    },
    "gemma4_text": _GLOBAL_HEADS | _SLIDING_AND_FULL,
    "gemma4_unified_text": _GLOBAL_HEADS | _SLIDING_AND_FULL,
    "gemma4_unified_vision": {"mm_posemb_size": 16},
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_kpool": 2, "qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"}
    | {"vision_config": {"hidden_size": 64}},
    "granite_speech_encoder": {"context_size": 16, "input_dim": 16},
    "granite_speech_plus_encoder": {"context_size": 16, "input_dim": 16},
    "hgnet_v2": {
        "embedding_size": 8,
        "stem_channels": (3, 8, 8),
        "stage_in_channels": (8, 16, 16, 16),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 16, 16, 32),
        "hidden_sizes": (16, 16, 16, 32),
        "stage_num_blocks": (1, 1, 1, 1),
        "stage_numb_of_layers": (2, 2, 2, 2),
    },
    "hiera": {"embed_dim": 8, "embed_dim_multiplier": 2.0, "depths": (1, 1, 1, 1)}
    | {"num_heads": (1, 2, 2, 4), "image_size": [64, 64]},
    "hunyuan_vl_vision": {"max_image_size": IMAGE, "img_max_token_num": 16},
    "janus_vqgan": {
        "base_channels": 32,
        "channel_multiplier": (1, 1),
        "num_res_blocks": 1,
        "num_patches": 4,
    },
    "kosmos_2_5_vision_model": {"max_num_patches": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "markuplm": {"max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20}
    | {"tag_pad_id": 19, "subs_pad_id": 19, "xpath_unit_hidden_size": 4, "max_depth": 4},
    "mobilenet_v1": {"depth_multiplier": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.1, "finegrained_output": False},
    "mobilevit": {"hidden_sizes": (8, 16, 16), "neck_hidden_sizes": (8, 8, 8, 8, 8, 8, 16)}
    | {"expand_ratio": 2.0, "patch_size": 2},
    "mobilevitv2": {"base_attn_unit_dims": (8, 8, 8), "n_attn_blocks": (1, 1, 1)}
    | {"width_multiplier": 0.25, "patch_size": 2},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "molmo2_vision": {"image_size": [IMAGE, IMAGE], "num_position_embeddings": 16},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron_h_omni": {"audio_config": {"projection_hidden_size": 32}},
    "perceiver": {"image_size": 16, "self_attention_widening_factor": 1},
    "pp_formulanet_vision": {"post_conv_in_channels": 8, "post_conv_mid_channels": 16}
    | {"post_conv_out_channels": 32, "global_attn_indexes": (1,), "window_size": 2},
    "pp_lcnet": {"scale": 0.1, "class_expand": 32},
    "qwen4_exp_text": {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1}
    | {"indexer_head_dim": HEAD_DIM, "indexer_budget": 8, "indexer_compress_ratio": 2}
    | _LINEAR_AND_FULL,
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "hy_v4_vl_vision": {"max_image_size": IMAGE},
    "hy_v4_vl_text": {"rope_parameters": _MROPE, "qk_rope_head_dim": 8},
    "qwen3_vl_text": {"rope_parameters": _MROPE},
    "qwen3_vl_moe_text": {"rope_parameters": _MROPE},
    "reformer": {
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (8, 24),
        "attn_layers": ("local", "lsh"),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
        "is_decoder": True,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "pronunciation_embed_dim": 16}
    | {"shape_vocab_size": VOCAB, "shape_embed_dim": 16},
    "sew": _CONVOLUTIONS,
    "sew-d": _CONVOLUTIONS,
    "swin": _PYRAMID | {"window_size": 4, "patch_size": 4},
    "swinv2": _PYRAMID | {"window_size": 4, "patch_size": 4, "pretrained_window_sizes": (0, 0)},
    "upernet": {"backbone_config": {"out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    "textnet": {
        "hidden_sizes": (8, 8, 16, 16, 16),
        "stem_out_channels": 8,
        "image_size": (IMAGE, IMAGE),
    },
    "unlimited_ocr_sam_vision_model": _SAM,
    "vibevoice_acoustic_tokenizer_encoder": {"depths": (1, 1, 1), "num_filters": 4}
    | {"downsampling_ratios": (2, 2)},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 64},
    "wav2vec2": _CONVOLUTIONS,
    "hubert": _CONVOLUTIONS,
    "wavlm": _CONVOLUTIONS,
    "unispeech": _CONVOLUTIONS,
    "unispeech-sat": _CONVOLUTIONS,
    "data2vec-audio": _CONVOLUTIONS,
    "wav2vec2-conformer": _CONVOLUTIONS,
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
    | {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1},
}
