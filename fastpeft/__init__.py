"""fastpeft: parameter-efficient fine-tuning of Hugging Face models through fused kernels, exact and interchangeable
with Hugging Face peft.

    model = fastpeft.patch(model, fastpeft.LoraConfig(r=16, target_modules="all-linear"))
    ...train as ever...
    fastpeft.save_adapter(model, "my-adapter")
"""

from fastpeft import ops
from fastpeft.adapters import (
    count_parameters,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge,
    merge_and_unload,
    print_trainable_parameters,
    save_adapter,
    set_adapter,
    unmerge,
    use_adapter,
)
from fastpeft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from fastpeft.configs import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaLoraConfig,
    AdaptionPromptConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
)
from fastpeft.dispatch import backend, set_backend
from fastpeft.errors import (
    AdapterFileError,
    BackendError,
    ConfigError,
    FastpeftError,
    OpError,
    PatchError,
    TargetError,
)
from fastpeft.fallback import kernel_failures
from fastpeft.fp8 import dequantise_base_fp8, quantise_base_fp8
from fastpeft.fusing import fuse, unfuse
from fastpeft.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from fastpeft.kbit_training import prepare_model_for_kbit_training
from fastpeft.lora_fa import freeze_lora_A
from fastpeft.lora_plus import param_groups
from fastpeft.mapping import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from fastpeft.patching import patch, unpatch
from fastpeft.prefix_init import (
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from fastpeft.rank_allocator import update_and_allocate
from fastpeft.rehoming import rehome, unrehome
from fastpeft.reporting import report
from fastpeft.state import adapter_state_dict
from fastpeft.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from fastpeft.status import get_layer_status, get_model_status, rescale_adapter_scale
from fastpeft.weighted import add_weighted_adapter
from fastpeft.wrapping import get_peft_model

__version__ = "0.1.0"

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdaLoraConfig",
    "AdapterFileError",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BackendError",
    "ConfigError",
    "FastpeftError",
    "LoraConfig",
    "OpError",
    "PatchError",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TargetError",
    "TaskType",
    "adapter_state_dict",
    "add_weighted_adapter",
    "backend",
    "count_parameters",
    "delete_adapter",
    "dequantise_base_fp8",
    "disable_adapter",
    "freeze_lora_A",
    "fuse",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "kernel_failures",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "ops",
    "param_groups",
    "patch",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "print_trainable_parameters",
    "prompt_embeddings_from_past_key_values",
    "quantise_base_fp8",
    "rehome",
    "report",
    "rescale_adapter_scale",
    "save_adapter",
    "set_adapter",
    "set_backend",
    "set_peft_model_state_dict",
    "unfuse",
    "unmerge",
    "unpatch",
    "unrehome",
    "update_and_allocate",
    "use_adapter",
]
