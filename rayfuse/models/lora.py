"""Merge a LoRA adapter into a model (arXiv 2106.09685): W + scale * B A for each layer it adapts.

Imported late: peft is optional (rayfuse[lora]), and takes seconds.
"""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.models.adapter import AdapterFiles
from rayfuse.models.weight_files import read_headers

SHOWN_FAULTS = 3


def merge_adapter(model: Any, adapter: AdapterFiles, name: str) -> Any:
    """Add an adapter to a model's weights, in place, and return the model.

    Args:
        model: A Hugging Face causal LLM.
        adapter: The adapter's files.
        name: The adapter's name in errors.

    Raises:
        UserError: The adapter does not fit the model, or a merged weight is not finite.
    """
    # Weights that a device map reads from a disk would be read again, without the adapter.
    assert not any(parameter.is_meta for parameter in model.parameters()), "weights are in memory"
    adapted = add_empty_adapter(model, adapter, name)
    with user_error_from(lambda error: _explain(error, name)):
        set_peft_model_state_dict(adapted, load_file(adapter.weights), low_cpu_mem_usage=True)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)  # peft freezes the model that it adds adapters to


def add_empty_adapter(model: Any, adapter: AdapterFiles, name: str) -> PeftModel:
    """Add an adapter's layers, without memory, to a model, and check that its file fits them.

    Args:
        model: A Hugging Face causal LLM, on the meta device or loaded.
        adapter: The adapter's files.
        name: The adapter's name in errors.

    Raises:
        UserError: The file has other tensors than the adapter of this model would have.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = ends[0].weight is ends[1].weight
    with user_error_from(lambda error: _explain(error, name)):
        config = LoraConfig(**adapter.settings, task_type="CAUSAL_LM", inference_mode=True)
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
        # Without embeddings: to learn if they were resized, peft would read the base from the hub.
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check_fit({key: tuple(tensor.shape) for key, tensor in needed.items()}, adapter, name)
    if is_tied and (model.get_input_embeddings(), model.get_output_embeddings()) != ends:
        raise UserError(
            f"adapter is {name!r}, which changes the embedding or the head of a model that has one "
            "weight for both; untie them, merge it with peft, and name that as `model`"
        )
    return adapted


def _check_fit(needed: dict[str, tuple[int, ...]], adapter: AdapterFiles, name: str) -> None:
    stored = {key: tensor.shape for key, tensor in read_headers([adapter.weights]).items()}
    faults = [f"{key} is missing" for key in sorted(needed.keys() - stored.keys())]
    faults += [f"{key} has no place in the model" for key in sorted(stored.keys() - needed.keys())]
    faults += [
        f"{key} is {list(stored[key])}, not {list(needed[key])}"
        for key in sorted(needed.keys() & stored.keys())
        if stored[key] != needed[key]
    ]
    if faults:
        shown = "; ".join(faults[:SHOWN_FAULTS])
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        trained_on = f" (it was trained on {adapter.base!r})" if adapter.base else ""
        raise UserError(
            f"adapter is {name!r}, which does not fit the model{trained_on}: {shown}{more}; name "
            "its own base as `model`"
        )


def _explain(error: Exception, name: str) -> UserError:
    return UserError(
        f"adapter is {name!r}, which cannot be merged into the model ({first_line(error)}); name "
        "its own base as `model`"
    )
