"""What the package relies on in other libraries beyond the names that it imports; see `tests/contracts.py`."""

from tests.contracts import Surface

_MODELS = "transformers.models"
_CHECKPOINTS = "fastpeft/integrations/trainer_checkpoints.py"
_HOOKS = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks"


def _attention(family: str, name: str, file: str, takes: str = "", has: str = "") -> list[Surface]:
    """An attention class with a forward of its own, for which `fastpeft/attention/<file>.py` has another."""
    path, where = f"{_MODELS}.{family}.modeling_{family}.{name}", f"fastpeft/attention/{file}.py"
    return [Surface(f"{path}.forward", where, takes=takes), Surface(path, where, has=has)]


TORCH = [
    Surface("torch.nn.Module", "fastpeft/integrations/peft/swapping.py", has=_HOOKS),
    Surface(
        "torch.nn.Module",
        "fastpeft/tuners/saved_modules.py",
        has="_forward_hooks_with_kwargs _forward_pre_hooks_with_kwargs",
    ),
    Surface("torch.nn.Module", "fastpeft/distributed.py", has="_parameters"),
    Surface("torch.nn.Module", _CHECKPOINTS, has="_modules"),
    Surface("torch.nn.Module._apply", "fastpeft/fp8_layer.py", takes="fn recurse"),
    Surface(
        "torch.nn.Module._load_from_state_dict",
        "fastpeft/fp8_layer.py",
        takes="state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
    ),
    Surface("torch.utils.checkpoint.CheckpointFunction.forward", "fastpeft/tuners/siblings.py", takes="ctx"),
    Surface("torch._scaled_mm", "fastpeft/ops/fp8_linear.py"),
    Surface("torch.nn.Conv2d", "fastpeft/tuners/lora_kinds.py", has="_conv_forward"),
    Surface(
        "torch.nn.parallel.DistributedDataParallel", "fastpeft/distributed.py", has="_active_ddp_module static_graph"
    ),
    Surface("torch._dynamo.OptimizedModule", _CHECKPOINTS, has="_orig_mod"),
    Surface(
        "torch.distributed.fsdp.FSDPModule", "fastpeft/distributed.py", has="set_requires_gradient_sync _get_fsdp_state"
    ),
    Surface("torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState", "fastpeft/distributed.py", has="_is_root"),
    Surface("torch.distributed.fsdp._common_utils.FSDP_FLATTENED", "fastpeft/distributed.py", is_="_fsdp_flattened"),
    Surface("torch.distributed.fsdp._flat_param.FlatParameter", "fastpeft/distributed.py", has="_is_flat_param"),
    Surface(
        "torch.distributed.tensor.DTensor", "fastpeft/distributed.py", has="full_tensor to_local device_mesh placements"
    ),
    Surface("torch.distributed.tensor.distribute_tensor", "fastpeft/distributed.py", takes="src_data_rank"),
]

TRITON = [
    Surface("triton.language.dot", "kernels/_common.py", takes="input_precision"),
    Surface("triton.language.load", "kernels/lora_linear.py", takes="mask other"),
    Surface("triton.language.range", "kernels/lora_linear.py", takes="num_stages"),
]

ATTENTION = [
    Surface("transformers.PreTrainedConfig", "fastpeft/attention/interface.py", has="_attn_implementation_internal"),
    Surface(
        "transformers.PreTrainedConfig._attn_implementation",
        "fastpeft/attention/interface.py",
        has="_attn_implementation_internal",
    ),
    Surface("transformers.PreTrainedConfig.get_text_config", "fastpeft/attention/sites.py", takes="decoder"),
    Surface(
        f"{_MODELS}.llama.modeling_llama.LlamaAttention.forward", "fastpeft/attention/sites.py", has="get_interface"
    ),
    Surface(f"{_MODELS}.llama.modeling_llama.LlamaAttention", "fastpeft/attention/sites.py", has="layer_idx config"),
    Surface(f"{_MODELS}.llama.modeling_llama.LlamaAttention", "fastpeft/attention/prompts.py", has="k_proj v_proj"),
    Surface(
        f"{_MODELS}.llama.modeling_llama.eager_attention_forward",
        "fastpeft/attention/interface.py",
        takes="module query key value attention_mask",
    ),
    Surface(f"{_MODELS}.llama.modeling_llama.LlamaRotaryEmbedding", "fastpeft/attention/positions.py", has="inv_freq"),
    Surface(
        f"{_MODELS}.llama.modeling_llama.LlamaRotaryEmbedding.forward",
        "fastpeft/attention/positions.py",
        takes="position_ids",
    ),
    Surface(
        f"{_MODELS}.opt.modeling_opt.OPTLearnedPositionalEmbedding", "fastpeft/attention/positions.py", has="offset"
    ),
    Surface(
        f"{_MODELS}.m2m_100.modeling_m2m_100.M2M100SinusoidalPositionalEmbedding.forward",
        "fastpeft/attention/positions.py",
        takes="past_key_values_length",
    ),
    Surface(
        f"{_MODELS}.t5.modeling_t5.T5Attention.compute_bias",
        "fastpeft/attention/positions.py",
        takes="query_length key_length device past_seen_tokens",
    ),
    *_attention(
        "bloom",
        "BloomAttention",
        "bloom",
        "hidden_states residual alibi attention_mask layer_past",
        "_reshape query_key_value dense layer_idx attention_dropout inv_norm_factor num_heads hidden_dropout",
    ),
    *_attention(
        "falcon",
        "FalconAttention",
        "falcon",
        "hidden_states alibi attention_mask position_ids layer_past position_embeddings",
        "_split_heads query_key_value dense layer_idx inv_norm_factor num_heads attention_dropout",
    ),
    *_attention(
        "mpt",
        "MptAttention",
        "mpt",
        "hidden_states position_bias past_key_values attention_mask",
        "Wqkv out_proj layer_idx n_heads clip_qkv softmax_scale attn_dropout_p",
    ),
    *_attention(
        "gptj",
        "GPTJAttention",
        "own_scores",
        "hidden_states layer_past attention_mask position_ids output_attentions",
        "_attn attn_dropout scale_attn",
    ),
    *_attention(
        "codegen",
        "CodeGenAttention",
        "own_scores",
        "hidden_states layer_past attention_mask position_ids output_attentions",
        "_attn attn_dropout scale_attn qkv_proj head_dim",
    ),
    *_attention(
        "gpt_neo",
        "GPTNeoSelfAttention",
        "own_scores",
        "hidden_states output_attentions",
        "_attn attn_dropout attention_type",
    ),
    *_attention(
        "deberta_v2",
        "DisentangledSelfAttention",
        "deberta_v2",
        "hidden_states attention_mask output_attentions query_states relative_pos rel_embeddings",
        "query_proj key_proj value_proj transpose_for_scores disentangled_attention_bias pos_att_type pos_dropout "
        "dropout relative_attention num_attention_heads",
    ),
    *_attention(
        "albert",
        "AlbertTransformer",
        "albert",
        "hidden_states attention_mask",
        "embedding_hidden_mapping_in albert_layer_groups",
    ),
    Surface(f"{_MODELS}.gpt2.modeling_gpt2.GPT2Attention", "fastpeft/attention/gpt2.py", has="head_dim"),
]

MASKS = [
    Surface(
        "transformers.masking_utils.sdpa_mask",
        "fastpeft/attention/masks.py",
        takes="q_length kv_length q_offset kv_offset mask_function attention_mask allow_is_causal_skip "
        "allow_is_bidirectional_skip",
    ),
    Surface(
        "transformers.masking_utils.eager_mask",
        "fastpeft/attention/masks.py",
        takes="q_length kv_length q_offset kv_offset mask_function attention_mask allow_is_bidirectional_skip",
    ),
    Surface("transformers.masking_utils.and_masks", "fastpeft/attention/masks.py", closes_over="mask_functions"),
    Surface(
        "transformers.masking_utils.sliding_window_overlay", "fastpeft/attention/masks.py", closes_over="sliding_window"
    ),
    Surface(
        "transformers.masking_utils.sliding_window_bidirectional_overlay",
        "fastpeft/attention/masks.py",
        closes_over="sliding_window",
    ),
    Surface(
        "transformers.masking_utils.packed_sequence_mask_function",
        "fastpeft/attention/masks.py",
        closes_over="packed_sequence_mask",
    ),
]

MODELS = [
    Surface(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "fastpeft/adapted_model.py",
        takes="enable gradient_checkpointing_func",
    ),
    Surface(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "fastpeft/patching.py",
        has="_gradient_checkpointing_func",
    ),
    Surface(
        "transformers.PreTrainedModel.gradient_checkpointing_enable",
        "fastpeft/kbit_training.py",
        takes="gradient_checkpointing_kwargs",
    ),
    Surface("transformers.PreTrainedModel", "fastpeft/patching.py", has="get_input_embeddings name_or_path"),
    Surface("transformers.PreTrainedModel", "fastpeft/neighbours.py", has="get_output_embeddings"),
    Surface(
        "transformers.PreTrainedModel",
        "fastpeft/fp8.py",
        has="base_model_prefix get_output_embeddings _keep_in_fp32_modules _keep_in_fp32_modules_strict",
    ),
    Surface("transformers.PreTrainedModel", "fastpeft/attention/sites.py", has="get_encoder get_decoder"),
    Surface("transformers.PreTrainedModel.resize_token_embeddings", "fastpeft/model.py", takes="new_num_tokens"),
    Surface("transformers.GenerationMixin.generate", "fastpeft/mixed_batches.py", takes="generation_config"),
    Surface(
        "transformers.GenerationMixin._prepare_cache_for_generation",
        "fastpeft/generation.py",
        takes="generation_config model_kwargs generation_mode batch_size max_cache_length",
    ),
    Surface("transformers.GenerationMixin.generate", "fastpeft/generation.py", has="_prepare_cache_for_generation"),
    Surface(
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        "fastpeft/generation.py",
        takes="next_sequence_length is_first_iteration",
        has="create_masks_for_generate",
    ),
    Surface(
        "transformers.masking_utils.create_masks_for_generate",
        "fastpeft/generation.py",
        takes="config inputs_embeds attention_mask",
    ),
    Surface("transformers.DynamicCache", "fastpeft/tuners/prompt_call.py", has="get_seq_length is_compileable"),
    Surface("transformers.DynamicCache", "fastpeft/prefix_init.py", has="layers"),
    Surface("transformers.EncoderDecoderCache", "fastpeft/prefix_init.py", has="self_attention_cache"),
    Surface("transformers.pytorch_utils.Conv1D", "fastpeft/integrations/peft/layers.py"),
    Surface(
        "transformers.PreTrainedModel",
        "fastpeft/integrations/peft/model.py",
        has="_hf_peft_config_loaded active_adapters",
    ),
    Surface("transformers.PreTrainedModel", "fastpeft/integrations/peft/tuners.py", has="add_adapter load_adapter"),
]

TRAINERS = [
    Surface("transformers.trainer.TRAINER_STATE_NAME", _CHECKPOINTS, is_="trainer_state.json"),
    Surface(
        "transformers.Trainer",
        _CHECKPOINTS,
        takes="model",
        has="is_deepspeed_enabled is_fsdp_enabled _load_best_model _load_from_checkpoint _save_checkpoint "
        "_inner_training_loop",
    ),
    Surface(
        "transformers.Trainer.train",
        _CHECKPOINTS,
        takes="resume_from_checkpoint",
        has="_inner_training_loop _load_from_checkpoint",
    ),
    Surface("transformers.Trainer._inner_training_loop", _CHECKPOINTS),
    Surface(
        "transformers.Trainer._save_checkpoint",
        _CHECKPOINTS,
        takes="model trial",
        has="_get_output_dir",
    ),
    Surface(
        "transformers.Trainer._load_from_checkpoint",
        _CHECKPOINTS,
        takes="resume_from_checkpoint model",
    ),
    Surface("transformers.Trainer._get_output_dir", _CHECKPOINTS, takes="trial"),
    Surface(
        "transformers.TrainingArguments",
        _CHECKPOINTS,
        has="use_liger_kernel liger_kernel_config output_dir should_save",
    ),
    Surface(
        "transformers.TrainerState",
        _CHECKPOINTS,
        has="global_step best_model_checkpoint",
    ),
    Surface("transformers.TrainerState", "fastpeft/integrations/trainer.py", has="max_steps"),
    Surface(
        "transformers.TrainerCallback",
        "fastpeft/integrations/trainer.py",
        has="on_train_begin on_optimizer_step on_save",
    ),
    *(
        Surface(f"trl.{name}Trainer", "fastpeft/integrations/trainer_trl.py", takes=takes)
        for name, takes in (
            ("SFT", "model args peft_config"),
            ("DPO", "model args ref_model peft_config"),
            ("GRPO", "model args peft_config"),
        )
    ),
    Surface("trl.GRPOTrainer", "fastpeft/integrations/trainer_trl.py", has="beta ref_model"),
    Surface(
        "trl.GRPOConfig",
        "fastpeft/integrations/trainer_trl.py",
        has="beta use_vllm disable_dropout sync_ref_model seed",
    ),
    Surface("trl.DPOConfig", "fastpeft/integrations/trainer_trl.py", has="disable_dropout sync_ref_model"),
    Surface("accelerate.hooks.add_hook_to_module", "fastpeft/tuners/layer.py", has="_old_forward _hf_hook"),
    Surface("accelerate.hooks.AlignDevicesHook", "fastpeft/tuners/layer.py", has="execution_device offload"),
    Surface("accelerate.hooks.SequentialHook", "fastpeft/tuners/layer.py", has="hooks"),
    Surface("accelerate.hooks.ModelHook.pre_forward", "fastpeft/tuners/layer.py", takes="module"),
    Surface("accelerate.hooks.ModelHook.post_forward", "fastpeft/tuners/layer.py", takes="module"),
    Surface("accelerate.optimizer.AcceleratedOptimizer", "fastpeft/integrations/trainer.py", has="step_was_skipped"),
]

_LORA, _ADALORA, _ADAPTION = "peft.tuners.lora.layer", "peft.tuners.adalora", "peft.tuners.adaption_prompt"
PEFT = [
    Surface(
        f"{_LORA}.LoraLayer",
        "fastpeft/integrations/peft/layers.py",
        has="r scaling lora_A lora_B lora_dropout lora_variant lora_magnitude_vector base_layer merged_adapters "
        "disable_adapters active_adapters _check_forward_args",
    ),
    Surface(f"{_LORA}.LoraLayer", "fastpeft/fp8.py", has="lora_variant merged_adapters base_layer"),
    Surface(f"{_LORA}.LoraLayer._check_forward_args", "fastpeft/integrations/peft/layers.py", takes="x"),
    Surface(
        f"{_LORA}.Linear.forward", "fastpeft/integrations/peft/layers.py", takes="x args kwargs", has="adapter_names"
    ),
    Surface(f"{_LORA}.LoraLayer", "fastpeft/integrations/peft/model.py", has="_get_available_adapters"),
    Surface(
        f"{_ADALORA}.layer.AdaLoraLayer",
        "fastpeft/integrations/peft/layers.py",
        has="lora_E lora_A lora_B ranknum scaling",
    ),
    Surface(
        f"{_ADALORA}.layer.RankAllocator",
        "fastpeft/integrations/peft/adalora_checkpoints.py",
        has="ipt exp_avg_ipt exp_avg_unc",
    ),
    Surface(
        f"{_ADALORA}.model.AdaLoraModel",
        "fastpeft/integrations/peft/adalora_checkpoints.py",
        has="rankallocator trainable_adapter_name peft_config",
    ),
    Surface(
        f"{_ADALORA}.model.AdaLoraModel",
        "fastpeft/integrations/trainer.py",
        has="update_and_allocate trainable_adapter_name",
    ),
    Surface(
        f"{_ADALORA}.model.AdaLoraModel.forward", "fastpeft/integrations/peft/tuners.py", has="orth_reg_weight loss"
    ),
    Surface("peft.tuners.tuners_utils.BaseTuner.inject_adapter", "fastpeft/integrations/peft/tuners.py", takes="model"),
    *(
        Surface(f"peft.tuners.{name}", "fastpeft/integrations/peft/tuners.py", has="_unload_and_optionally_merge")
        for name in ("tuners_utils.BaseTuner.unload", "tuners_utils.BaseTuner.merge_and_unload", "mixed.MixedModel")
    ),
    Surface(
        f"{_ADAPTION}.model.AdaptionPromptModel",
        "fastpeft/integrations/peft/gated.py",
        has="_cached_adapters _parents _active_adapter _enabled peft_config enable_adapter_layers "
        "disable_adapter_layers forward",
    ),
    Surface(
        f"{_ADAPTION}.model.AdaptionPromptModel.add_adapter",
        "fastpeft/integrations/peft/gated.py",
        takes="adapter_name config",
    ),
    Surface(
        f"{_ADAPTION}.model.AdaptionPromptModel.set_adapter",
        "fastpeft/integrations/peft/gated.py",
        takes="adapter_name",
    ),
    Surface(f"{_ADAPTION}.layer.AdaptedAttention", "fastpeft/integrations/peft/gated.py", has="model"),
    Surface(
        f"{_ADAPTION}.layer.AdaptedAttention", "fastpeft/tuners/attention_layer.py", has="adaption_prompt adaption_gate"
    ),
    Surface(
        "peft.PeftModel",
        "fastpeft/integrations/peft/prompts.py",
        has="prompt_encoder base_model active_adapter _adapters_disabled peft_config",
    ),
    Surface(
        "peft.PeftModel",
        "fastpeft/integrations/peft/model.py",
        has="_is_prompt_learning active_adapters get_base_model",
    ),
    Surface("peft.PeftModel.add_adapter", "fastpeft/integrations/peft/prompts.py", takes="adapter_name peft_config"),
    Surface("peft.PeftModel.load_adapter", "fastpeft/integrations/peft/prompts.py", takes="model_id adapter_name"),
    Surface("peft.PeftModel.load_adapter", "fastpeft/integrations/peft/adalora_checkpoints.py", takes="is_trainable"),
    Surface("peft.PeftModel.delete_adapter", "fastpeft/integrations/peft/prompts.py", takes="adapter_name"),
    Surface(
        "peft.PeftModelForCausalLM", "fastpeft/integrations/peft/prompts.py", has="forward generate generation_config"
    ),
    Surface("peft.get_peft_model", "fastpeft/integrations/peft/wrap.py", takes="model adapter_name"),
]

FILES = [
    Surface("safetensors.torch.save", "fastpeft/files.py", takes="metadata"),
    Surface("safetensors.torch.save_file", "fastpeft/integrations/peft/adalora_checkpoints.py", takes="metadata"),
    Surface("peft.utils.SAFETENSORS_WEIGHTS_NAME", "fastpeft/journal.py", is_="adapter_model.safetensors"),
    Surface("peft.utils.CONFIG_NAME", "fastpeft/journal.py", is_="adapter_config.json"),
    Surface("regex.compile", "fastpeft/patterns.py", takes="pattern"),
]

QUANTISED = [
    Surface("bitsandbytes.matmul_4bit", "fastpeft/integrations/quantised.py", takes="quant_state"),
    Surface("bitsandbytes.functional.QuantState", "fastpeft/integrations/quantised.py", has="shape dtype"),
    Surface(
        "bitsandbytes.nn.Params4bit",
        "fastpeft/integrations/quantised.py",
        has="blocksize compress_statistics quant_type quant_storage module quant_state",
    ),
    Surface("bitsandbytes.nn.Int8Params", "fastpeft/integrations/quantised.py", has="SCB has_fp16_weights"),
    Surface("bitsandbytes.MatmulLtState", "fastpeft/integrations/quantised.py", has="SCB has_fp16_weights reset_grads"),
    Surface(
        "torchao.quantization.Int8Tensor.from_hp",
        "fastpeft/integrations/quantised.py",
        takes="granularity act_quant_kwargs",
    ),
    Surface(
        "torchao.quantization.Float8Tensor.from_hp",
        "fastpeft/integrations/quantised.py",
        takes="float8_dtype granularity mm_config kernel_preference act_quant_kwargs",
    ),
    Surface(
        "torchao.quantization.IntxUnpackedToInt8Tensor.from_hp",
        "fastpeft/integrations/quantised.py",
        takes="block_size target_dtype mapping_type activation_quantization",
    ),
]

TABLE = [*TORCH, *TRITON, *ATTENTION, *MASKS, *MODELS, *TRAINERS, *PEFT, *FILES, *QUANTISED]
