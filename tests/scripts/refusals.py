"""How a training script refuses bad input: one sentence, before any step, and nothing left behind."""

import pytest

from brisk import options


def sentence_of(run, output, *flags, exit_code=2, longest=600, **named):
    """The message of the UserError with which `run(*flags, output=output)`, one of the fixtures run_*, is refused."""
    with pytest.raises(options.UserError) as caught:
        run(*flags, output=output, **named)
    message = str(caught.value)
    assert caught.value.exit_code == exit_code
    assert message and "\n" not in message and "Traceback" not in message and len(message) < longest
    assert " step 1 " not in run.log(), "work started before the fault was found"
    assert not output.exists(), "a refused run leaves no folder behind"
    return message
