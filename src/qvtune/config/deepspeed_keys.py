"""The keys of a DeepSpeed JSON: which a run may have, and which are refused."""

# Keys that a JSON may have, at the top and in two of its blocks. DeepSpeed ignores keys that it does not know, and most
# that it knows belong to things that this project does itself (schedule, master weights, checkpoints, reports).
# The keys of zero_optimization are checked by DeepSpeed's own schema, those of the loggers by the loggers.
ALLOWED_KEYS: dict[str, tuple[str, ...]] = {
    "": (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "communication_data_type",
        "data_types",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "log_level",
        "comms_logger",
        "flops_profiler",
    ),
    "bf16": ("enabled", "check_grad_overflow"),
    "data_types": ("grad_accum_dtype",),
}

_OPTIMIZER = "DeepSpeed would update the adapters with an optimizer of its own"
_CODES = "{}, but a quantized base is stored as packed 4-bit codes, which are not numbers"
_ROUNDS = _CODES.format("DeepSpeed would round the frozen parameters")
_ADDS = _CODES.format("DeepSpeed would gather parameters by adding zeros to them")
# Dotted names of keys that DeepSpeed reads and a JSON may not have -> why not.
REFUSED_KEYS: dict[str, str] = {
    "optimizer": f"{_OPTIMIZER}, and the learning rate of each parameter group would be lost; "
    "section `optimizer` of the run holds these settings",
    "scheduler": "DeepSpeed's schedulers give all parameter groups one learning rate (DeepSpeed issues #7303, #8171); "
    "section `schedule` of the run holds these settings",
    "fp16": "float16 is not supported; `model.dtype` may be bfloat16 or float32",
    "torch_autocast": _CODES.format("DeepSpeed would cast parameters while it gathers them"),
    "weight_quantization": _ROUNDS,
    "zero_optimization.zero_quantized_weights": _ROUNDS,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDS,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _ADDS,
    "zero_optimization.use_all_reduce_for_fetch_params": _ADDS,  # DeepSpeed takes both spellings
    "zero_optimization.zenflow": _OPTIMIZER,
    "zero_optimization.offload_optimizer.ratio": _OPTIMIZER,
    "zero_optimization.offload_optimizer.super_offload": _OPTIMIZER,
    "zero_optimization.compute_grad_norm": "the gradient norm is clipped and recorded in every step",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.cpu_offload": "DeepSpeed has replaced it by `offload_optimizer`",
    "zero_optimization.cpu_offload_param": "DeepSpeed has replaced it by `offload_param`",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed has replaced it by `pin_memory` of `offload_param`",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "nothing is saved through DeepSpeed",
}
