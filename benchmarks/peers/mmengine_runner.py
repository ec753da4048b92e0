"""MMEngine's Runner, with the hooks that it installs by itself (and a log on each 50th step), or with none."""

from __future__ import annotations

from typing import Any

from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


class Model(BaseModel):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any, y: Any, mode: str) -> Any:
        return {"loss": loss_fn(self.model, (x, y))}


def train(turns: Turns, problem: Problem, hooks: bool, **adamw: Any) -> None:
    named = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
    runner = Runner(
        Model(problem.model),
        work_dir="mmengine",
        train_dataloader=DataLoader(turns, batch_size=None),
        train_cfg={"by_epoch": True, "max_epochs": 10**6},
        optim_wrapper=OptimWrapper(AdamW(problem.model.parameters(), lr=1e-3, **adamw)),
        # sampler_seed is for samplers of several processes, and these batches have none.
        default_hooks={"logger": {"type": "LoggerHook", "interval": 50}, "sampler_seed": None} if hooks else dict.fromkeys(named),
    )
    runner.train()
