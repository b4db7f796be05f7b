"""How much of quantization a step of training sees."""


def blend_at(step: int, blend_steps: int) -> float:
    """Share of quantization at optimizer step ``step``: from 0 at the first to 1 after ``blend_steps``.

    A pure function of the step, so that a resumed run needs no state for it.
    """
    return 1.0 if step >= blend_steps else step / blend_steps
