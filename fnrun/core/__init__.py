"""What everything else stands on: the state, and how it is kept, compared, keyed and never written to.

The state
    state.py         TrainState, and what a state is to a loop
    position.py      where a program stands: frames of the open loops, cursors of the streams
    tree.py          pytrees: structs, leaves by path, comparison by bits
    key.py           keyed randomness
    donation.py      who may write over which tensors
    entering.py      what enters a state is detached
    inplace.py       who wrote to what is never written to
    placing.py       where the tensors of a tree are
Around a call
    context.py       which loop of which program is around it
    reports.py       values that come up inside a step
    waiting.py       an interrupt that comes while data is waited for
    undisturbed.py   what Ctrl-C leaves whole
    environment.py   what else bits depend on
Values
    examples.py      how many examples a batch has
    counts.py        what a count is
    checkpoint_name.py   the name of a checkpoint's directory
    files.py         a file, written whole
    documents.py     plain data as JSON, flattened
    tables.py        tables and numbers in print
    words.py         values in messages
    moved.py         modules that once had another place
"""
