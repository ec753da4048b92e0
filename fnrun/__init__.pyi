from . import (
    checkpoint as checkpoint,
    data as data,
    hooks as hooks,
    loops as loops,
    metrics as metrics,
    observers as observers,
    optim as optim,
    rng as rng,
    run as run,
    schedules as schedules,
    state as state,
    testing as testing,
    tree as tree,
)
from .cli import main as main
from .donation import DonatedStateError as DonatedStateError
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
from .loops.context import ProgramError as ProgramError
from .loops.contracts import Hook as Hook, Observer as Observer
from .loops.interrupts import any_of as any_of, deadline as deadline
from .reports import report as report
from .rng import Key as Key
from .run import Experiment as Experiment, Run as Run, RunError as RunError
from .state import Cursor as Cursor, Frame as Frame, Position as Position, TrainState as TrainState
from .steps import (
    TrainStep as TrainStep,
    make_eval_step as make_eval_step,
    make_predict_step as make_predict_step,
    make_train_step as make_train_step,
    skip_nonfinite as skip_nonfinite,
    step as step,
    value_and_grad as value_and_grad,
)
from .steps.shell import call as call
from .tree import snapshot as snapshot, static as static, struct as struct

__version__: str
