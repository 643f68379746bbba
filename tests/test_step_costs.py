"""What steps cost, learnt from noisy measurements."""

import numpy as np

from labinfer.runtime.step_costs import StepCosts, round_down


def test_prompts_are_cut_so_that_steps_last_as_long_as_allowed() -> None:
    random, costs, sizes = np.random.default_rng(0), StepCosts(), []
    assert costs.prompt_tokens(8, 0.5) == 4
    for _ in range(50):
        costs.observe(8, 0, 0.010 * random.uniform(0.7, 1.3))
    for _ in range(200):
        sizes.append(costs.prompt_tokens(8, 0.5))
        costs.observe(8, sizes[-1], (0.010 + 0.0004 * sizes[-1]) * random.uniform(0.7, 1.3))
    assert sizes[0] == 4
    assert all(later <= 2 * max(sizes[:place]) for place, later in enumerate(sizes) if place)
    assert 6 <= np.median(sizes[50:]) <= 16  # 12.5 tokens are half a decode step


def test_what_decoding_costs_is_measured_anew_while_prompts_are_computed() -> None:
    costs, sizes = StepCosts(), []
    for step in range(600):
        sizes.append(0 if step < 20 else costs.prompt_tokens(8, 0.5))
        decoding = 0.010 * (1 + step / 300)  # contexts grow
        costs.observe(8, sizes[-1], decoding + 0.001 * sizes[-1])
    assert sizes[20:].count(0) >= 30
    assert max(sizes[-40:]) >= 8  # 14.5 tokens are half of the last decode step


def test_one_slow_step_changes_little() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.observe(4, 0, 0.01)
        costs.observe(4, 8, 0.014)
    before = costs.prompt_tokens(4, 0.5)
    costs.observe(4, 8, 5.0)
    costs.observe(4, 0, 5.0)
    assert before == 8
    assert costs.prompt_tokens(4, 0.5) >= 3


def test_prompts_alone_say_what_it_takes_to_compute_a_text_again() -> None:
    costs = StepCosts()
    assert costs.prompt_seconds(100) == 0
    costs.observe(0, 50, 0.1)
    costs.observe(8, 0, 0.01)
    costs.observe(8, 4, 0.05)
    assert np.isclose(costs.prompt_seconds(100), 0.2)


class Asked(int):
    """A number of sequences that another is measured beside while somebody looks at it."""

    costs: StepCosts

    def __sub__(self, other: int) -> int:
        self.costs.observe(1 << len(self.costs.decode) + 8, 0, 0.5)
        return int(self) - other


def test_who_asks_while_more_is_measured_gets_an_answer() -> None:
    costs = StepCosts()
    for size in (1, 7):
        known = Asked(size)
        known.costs = costs
        costs.decode[known] = 0.01 * size
    assert costs.decode_seconds(1 << 4) == 0.07
    assert len(costs.decode) == 4


def test_sizes_are_few() -> None:
    assert [round_down(count) for count in (0, 1, 2, 3, 5, 7, 11, 15, 23, 1000)] == [1, 1, 2, 3, 4, 6, 8, 12, 16, 768]


def test_a_slow_decode_step_does_not_make_room_for_more_of_a_prompt() -> None:
    costs = StepCosts()
    costs.observe(0, 100, 0.2)  # 2 ms a token
    for _ in range(50):
        costs.observe(8, 0, 0.020)
    for _ in range(50):
        costs.observe(8, 2, 0.022)
    costs.observe(8, 0, 0.040)
    assert costs.decode_seconds(8) <= 0.0211
    for _ in range(10):
        costs.observe(8, 8, 0.020)  # where the machine was slow before, tokens of a prompt seem to cost nothing
    assert costs.prompt_tokens(8, 0.2) == 4  # but 12 of them and of the decodes take 24 ms by themselves
