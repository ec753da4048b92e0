from . import (
    checkpoint as checkpoint,
    data as data,
    hooks as hooks,
    loops as loops,
    metrics as metrics,
    observers as observers,
    optim as optim,
    schedules as schedules,
    sinks as sinks,
    testing as testing,
)
from .cli.experiment import main as main
from .core import tree as tree
from .core.donation import DonatedStateError as DonatedStateError
from .core.key import Key as Key
from .core.position import Cursor as Cursor, Frame as Frame, Position as Position
from .core.reports import report as report
from .core.state import TrainState as TrainState
from .core.tree import snapshot as snapshot, static as static, struct as struct
from .loops import (
    Loop as Loop,
    epoch_loop as epoch_loop,
    eval_loop as eval_loop,
    every as every,
    predict_loop as predict_loop,
    repeat as repeat,
    sequence as sequence,
    step_loop as step_loop,
    workflow as workflow,
    wraps as wraps,
)
from .loops.contracts import Hook as Hook, Observer as Observer
from .loops.exits import ProgramError as ProgramError
from .loops.interrupts import any_of as any_of, deadline as deadline
from .runs.run import Experiment as Experiment, Run as Run, RunError as RunError
from .steps import (
    TrainStep as TrainStep,
    make_eval_step as make_eval_step,
    make_predict_step as make_predict_step,
    make_train_step as make_train_step,
    skip_nonfinite as skip_nonfinite,
    step as step,
    value_and_grad as value_and_grad,
)
from .steps.functional import call as call

__version__: str
