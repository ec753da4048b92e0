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
from .loops import Loop as Loop
from .loops import epoch_loop as epoch_loop
from .loops import eval_loop as eval_loop
from .loops import every as every
from .loops import predict_loop as predict_loop
from .loops import repeat as repeat
from .loops import sequence as sequence
from .loops import step_loop as step_loop
from .loops import workflow as workflow
from .program import Hook as Hook
from .program import Observer as Observer
from .program import ProgramError as ProgramError
from .reports import report as report
from .rng import Key as Key
from .run import Experiment as Experiment
from .run import Run as Run
from .run import RunError as RunError
from .shell import call as call
from .state import Cursor as Cursor
from .state import Frame as Frame
from .state import Position as Position
from .state import TrainState as TrainState
from .steps import make_eval_step as make_eval_step
from .steps import make_predict_step as make_predict_step
from .steps import make_train_step as make_train_step
from .steps import skip_nonfinite as skip_nonfinite
from .steps import step as step
from .steps import value_and_grad as value_and_grad
from .tree import static as static
from .tree import struct as struct

__version__: str
