"""A reward function gets the columns that it names, and a name that says two things is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from prefkern.integrations.ppo import prompts

ROWS = [{"prompt": [3, 4], "answer": 1}, {"prompt": [5], "answer": 2}]
RESPONSES = ["a", "b"]


def rewards(reward_fn: Callable[..., Any], rows: list[Any] = ROWS) -> list[Any]:
    columns = prompts.Prompts(rows, None).take(list(range(len(rows))))[1]
    return prompts.rewards(reward_fn, None, columns, RESPONSES)


def test_columns_are_given_by_name() -> None:
    assert rewards(lambda prompts, responses: [0.0, 1.0]) == [0.0, 1.0]
    assert rewards(lambda prompts, responses, answer: answer) == [1, 2]
    assert rewards(lambda prompts, responses, *, response_ids, answer=None: [*response_ids]) == RESPONSES
    assert rewards(lambda prompts, responses, **rest: [sorted(rest), rest["answer"]]) == [
        ["answer", "response_ids"],
        [1, 2],
    ]
    assert rewards(lambda prompts, responses, missing=7: [missing, missing]) == [7, 7]


@pytest.mark.parametrize("name", ["prompts", "responses"])
def test_a_column_named_like_an_argument_is_refused(name: str) -> None:
    rows = [row | {name: "x"} for row in ROWS]
    sentence = f"dataset has a column '{name}', which is also reward_fn's own argument {name}: rename the column"
    for asks in (lambda prompts, responses: [0.0, 1.0], lambda prompts, responses, **rest: [0.0, 1.0]):
        with pytest.raises(ValueError, match=sentence):
            rewards(asks, rows)
    # under other names the arguments leave the column its own
    assert rewards(lambda questions, answers, **rest: rest[name], rows) == ["x", "x"]

    def of_column(questions: Any, answers: Any, prompts: Any = None, responses: Any = None) -> Any:
        return {"prompts": prompts, "responses": responses}[name]

    assert rewards(of_column, rows) == ["x", "x"]

    def by_place(prompts: Any, responses: Any, /, **rest: Any) -> Any:
        return rest[name]

    assert rewards(by_place, rows) == ["x", "x"]


def test_a_column_of_response_ids_is_refused_where_it_is_asked_for() -> None:
    rows = [row | {"response_ids": [9]} for row in ROWS]
    for asks in (lambda prompts, responses, response_ids: [0, 1], lambda prompts, responses, **rest: [0, 1]):
        with pytest.raises(ValueError, match="column 'response_ids', which is also the ids of the responses: rename"):
            rewards(asks, rows)
    assert rewards(lambda prompts, responses: [0, 1], rows) == [0, 1]


def test_the_prompts_may_have_the_name_of_the_first_argument() -> None:
    rows = [{"query": [3, 4]}, {"query": [5]}]
    assert rewards(lambda query, response: query, rows) == [[3, 4], [5]]
    assert rewards(lambda prompts, responses, **rest: [sorted(rest)] * 2, rows) == [["query", "response_ids"]] * 2
    both = [row | {"prompt": [6]} for row in rows]  # the prompts are those of the column `prompt`
    with pytest.raises(ValueError, match="dataset has a column 'query', which is also reward_fn's own argument query"):
        rewards(lambda query, response: query, both)


def test_a_column_that_begins_after_the_first_row_is_given() -> None:
    rows = [{"prompt": [3]}, {"prompt": [4], "answer": 2}]
    assert rewards(lambda prompts, responses, answer: answer, rows) == [None, 2]
    assert rewards(lambda prompts, responses, **rest: rest["answer"], rows) == [None, 2]


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="reward_fn asks for level, but the dataset's columns are prompt, answer"):
        rewards(lambda prompts, responses, level: level)
