"""What a patched model can do: the mixin in front of the model's own class, with peft's verbs."""

from typing import ClassVar

from fastpeft.adapted_model import AdaptedModel
from fastpeft.calls import Room, widened
from fastpeft.distributed import is_sharded


class PatchedModel(AdaptedModel):
    """Methods that scripts written for peft call, with peft's names and meaning. Each is one function of fastpeft, and
    raises what that raises.

    A task's class (`fastpeft.tasks`) says besides: heads, what the task trains whole, by the end of a module's path;
    peft_drops, the arguments that HF peft's class of the task does not hand on.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    peft_drops: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def move_targets(cls, given: dict, room: Room, spares: bool) -> None:
        """Fit the targets among a call's arguments to virtual tokens in front, in place. `spares`: the model can leave
        out the logits of some places, and the caller asks for all."""

    @classmethod
    def move_targets_as_peft(cls, given: dict, room: Room) -> None:
        """The same, and segments, as HF peft does it."""
        if (kinds := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = widened(kinds, room, 0, "token_type_ids")

    @classmethod
    def decodes_its_input(cls, given: dict) -> bool:
        """Whether a sequence-to-sequence model will make its decoder's input of the encoder's."""
        return all(given.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds"))

    @property
    def peft_config(self) -> dict:
        """Adapter name -> configuration."""
        return self._fastpeft.configs

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that calls use, unless a `with` block overrides them."""
        return list(self._fastpeft.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The one active adapter's name, or the list of them."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self):
        """The configuration of the active adapter; of the first, if there are several."""
        return self._fastpeft.configs[self.active_adapters[0]]

    def get_base_model(self):
        """The model itself: it is the base model, with adapters in it."""
        return self

    def save_pretrained(
        self, save_directory, safe_serialization=True, selected_adapters=None, save_embedding_layers="auto",
        is_main_process=True, path_initial_model_for_weight_conversion=None, **kwargs,
    ) -> None:  # fmt: skip
        """Write the adapters, and only them, in HF peft's layout: "default" into the directory, any other into a folder
        of its name, also if it is the only one. Nothing where `is_main_process` is False, unless parameters are sharded
        and no `state_dict`, the model's whole one, has their values: all processes gather them then. Other arguments of
        transformers' method of this name (shard sizes, …) have nothing to act on; what peft would do and fastpeft does
        not is refused."""
        from fastpeft import adapters

        adapters.check_arguments(
            "save_pretrained", safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            push_to_hub=kwargs.get("push_to_hub", False),
        )  # fmt: skip
        full = kwargs.get("state_dict")
        if is_main_process or full is None and any(map(is_sharded, self.parameters())):
            adapters.save_all(self, save_directory, selected_adapters, full, save_embedding_layers is True)

    def load_adapter(
        self, model_id, adapter_name="default", is_trainable=False, torch_device=None, autocast_adapter_dtype=True,
        ephemeral_gpu_offload=False, low_cpu_mem_usage=False, key_mapping=None, **kwargs,
    ):  # fmt: skip
        """Add an adapter from a directory; it becomes active only by `set_adapter`. It is put where the base is, and
        never initialised first, whatever `torch_device` and `low_cpu_mem_usage` say; other requests are refused.
        `embeddings=True` is fastpeft's own: the file may replace the model's embeddings."""
        from fastpeft import adapters

        embeddings = kwargs.pop("embeddings", False)
        adapters.check_arguments(
            "load_adapter", ephemeral_gpu_offload=ephemeral_gpu_offload, key_mapping=key_mapping, **kwargs
        )
        return adapters.load_adapter(
            self, model_id, adapter_name=adapter_name, trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype, embeddings=embeddings,
        )  # fmt: skip

    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True) -> None:
        """Add a new adapter; it becomes active only by `set_adapter`."""
        from fastpeft import adapters

        adapters.add_adapter(self, adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)

    def add_weighted_adapter(
        self, adapters, weights, adapter_name, combination_type="svd", svd_rank=None, svd_clamp=None,
        svd_full_matrices=True, svd_driver=None, density=None, majority_sign_method="total",
    ) -> None:  # fmt: skip
        """Add a LoRA made of others; it becomes active only by `set_adapter`. The factors of the whole matrices are
        never needed, whatever `svd_full_matrices` says, and torch chooses the driver."""
        from fastpeft.weighted import add_weighted_adapter

        add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, density, majority_sign_method
        )

    def set_adapter(self, adapter_name, inference_mode=False) -> None:
        """Make one adapter (or a list, added up) the active one, and train it, also if it was loaded for inference,
        unless `inference_mode` is True."""
        from fastpeft import adapters

        adapters.set_adapter(self, adapter_name, trainable=not inference_mode)

    def delete_adapter(self, adapter_name) -> None:
        """Remove an adapter; if it was the active one, another takes its place."""
        from fastpeft import adapters

        adapters.delete_adapter(self, adapter_name)

    def disable_adapter(self):
        """A context manager: inside, this thread's calls compute the base model."""
        from fastpeft import adapters

        return adapters.disable_adapter(self)

    def merge_adapter(self, adapter_names=None, safe_merge=True) -> None:
        """Add the active (or these) adapters to the base weights, until `unmerge_adapter`; always safely."""
        from fastpeft import adapters

        adapters.merge(self, adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit for bit."""
        from fastpeft import adapters

        adapters.unmerge(self)

    def merge_and_unload(self, progressbar=False, safe_merge=True, adapter_names=None):
        """The plain model, with the active (or these) adapters in its weights; always safely, without a bar."""
        from fastpeft import adapters

        return adapters.merge_and_unload(self, adapter_names)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """transformers' own method. Raises PatchError if an adapter is made for the present size."""
        from fastpeft import adapters

        adapters.check_resize(self, new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's step: after the optimizer's, and before gradients are set to zero."""
        from fastpeft.rank_allocator import update_and_allocate

        update_and_allocate(self, global_step)

    def unload(self):
        """The plain model, without the adapters."""
        from fastpeft.patching import unpatch

        return unpatch(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; packed 4-bit ones count twice their storage."""
        from fastpeft import adapters

        return adapters.count_parameters(self)

    def get_layer_status(self):
        """The state of each layer's adapters."""
        from fastpeft.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self):
        """The state of the adapters in the whole model."""
        from fastpeft.status import get_model_status

        return get_model_status(self)

    def print_trainable_parameters(self) -> None:
        """peft's line."""
        from fastpeft import adapters

        adapters.print_trainable_parameters(self)
