"""What the settings of the paper's own script, qlora.py, are called here: old habits get an answer."""

from collections.abc import Sequence

NAMES = {
    "model_name_or_path": ("model",),
    "output_dir": ("out",),
    "overwrite_output_dir": ("overwrite",),
    "bits": ("quantize", "quant.codebook"),
    "quant_type": ("quant.codebook",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "full_finetune": ("adapters",),
    "lora_r": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "lora_modules": ("lora.target_modules",),
    "dataset": ("data.path",),
    "dataset_format": ("data.format",),
    "eval_dataset_size": ("data.eval_size",),
    "max_eval_samples": ("data.eval_size",),
    "data_seed": ("data.seed",),
    "model_max_length": ("data.max_len",),
    "per_device_train_batch_size": ("batch_size",),
    "per_device_eval_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation",),
    "num_train_epochs": ("epochs",),
    "logging_steps": ("log_every",),
    "save_total_limit": ("keep_checkpoints",),
    "optim": ("optimizer.name",),
    "lr": ("optimizer.learning_rate",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "adam_epsilon": ("optimizer.eps",),
    "report_to": ("tensorboard",),
    "max_new_tokens": ("sample_tokens",),
    "do_mmlu_eval": ("mmlu.data",),
    "mmlu_dataset": ("mmlu.data", "mmlu.num_fewshot"),
    "mmlu_split": ("mmlu.split",),
    "mmlu_source_max_len": ("mmlu.max_len",),
    "max_mmlu_samples": ("mmlu.limit",),
}
ABSENT = {
    "max_memory": "a model is loaded whole onto the one device that `device` names",
    "max_memory_MB": "a model is loaded whole onto the one device that `device` names",
    "cache_dir": "a model is read from a path and never downloaded",
    "use_auth_token": "a model is read from a path and never downloaded",
    "trust_remote_code": "files are read as data and never run",
    "do_train": "`qlora train` always trains",
    "do_eval": "held-out loss is measured wherever data.eval_size is above 0",
    "do_predict": "`qlora generate` writes texts",
    "evaluation_strategy": "eval_steps alone says when",
    "save_strategy": "save_steps alone says when",
    "logging_strategy": "log_every alone says when",
    "remove_unused_columns": "what a layout does not use is never read",
}


def translation(name: str, known: Sequence[str]) -> str:
    """Say what qlora.py's setting is called here; nothing if it is not its name, or if ours is not among `known`.

    >>> translation("lora_r", ["model", "lora.rank"])
    "qlora.py's lora_r is lora.rank here"
    """
    if name in known:
        return ""
    if name in ABSENT and "model" in known:
        return f"there is no need for qlora.py's {name}: {ABSENT[name]}"
    ours = [each for each in NAMES.get(name, ()) if each in known]
    return f"qlora.py's {name} is {' and '.join(ours)} here" if ours else ""
