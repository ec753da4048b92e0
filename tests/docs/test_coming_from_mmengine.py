"""docs/coming-from-mmengine.md names all that mmengine has."""

from __future__ import annotations

import re

from tests.docs import pages

PAGE = pages.text("coming-from-mmengine.md")

#: `Hook.stages` of mmengine 0.10.7.
STAGES = [
    "before_run", "after_load_checkpoint", "before_train", "before_train_epoch", "before_train_iter", "after_train_iter",
    "after_train_epoch", "before_val", "before_val_epoch", "before_val_iter", "after_val_iter", "after_val_epoch", "after_val",
    "before_save_checkpoint", "after_train", "before_test", "before_test_epoch", "before_test_iter", "after_test_iter",
    "after_test_epoch", "after_test", "after_run",
]  # fmt: skip

#: `mmengine.hooks.__all__` without the base class.
HOOKS = [
    "IterTimerHook", "DistSamplerSeedHook", "ParamSchedulerHook", "SyncBuffersHook", "EmptyCacheHook", "CheckpointHook", "LoggerHook",
    "NaiveVisualizationHook", "EMAHook", "RuntimeInfoHook", "ProfilerHook", "PrepareTTAHook", "NPUProfilerHook", "EarlyStoppingHook",
]  # fmt: skip

#: The arguments of `Runner.__init__`, and what it reads from the config besides.
KEYS = [
    "model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg", "auto_scale_lr",
    "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks", "custom_hooks", "data_preprocessor",
    "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level", "visualizer", "default_scope", "randomness",
    "experiment_name", "cfg", "model_wrapper_cfg", "sync_bn", "find_unused_parameters", "activation_checkpointing",
    "efficient_conv_bn_eval", "compile",
]  # fmt: skip


def test_every_hook_point_hook_and_key_of_theirs_is_named():
    assert len(STAGES) == 22
    tables = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    assert [name for name in (*STAGES, *HOOKS, *KEYS) if not re.search(rf"`{name}[`(]", tables)] == []
