"""Which answer belongs to which question.

Special here: `question_id` is no key (TextVQA's and MME's repeat), and old answers files have no
uid. A record is placed by its uid (under whatever name the set was read), else by id and prompt,
else by an id that is asked once; answers to another question file are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.questions import Question

Key = tuple[str, str]


def join_answers(
    questions: Sequence[Question], records: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """uid -> text of LLaVA's answer records (`question_id`, `prompt`, `text`), with or without our
    `uid`. Records that repeat an answer are tolerated.

    Raises ValueError for a record without text, one that answers no question asked here, or two
    different answers to one question.
    """
    table = _Table(questions)
    given: dict[str, str] = {}
    for number, record in enumerate(records, start=1):
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f"answer {number} has no text: {str(dict(record))[:120]}")
        uid = table.place(record, number)
        if given.setdefault(uid, text) != text:
            raise ValueError(f"two different answers to {uid}: {given[uid]!r} and {text!r}")
    return given


class _Table:
    """The questions by uid, by id with prompt, and by id."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.uids = {_unnamed(question.uid): question.uid for question in questions}
        self.by_prompt: dict[Key, list[Question]] = {}
        self.by_id: dict[str, list[Question]] = {}
        for question in questions:
            own = str(question.question_id)
            self.by_prompt.setdefault((own, _plain(question.text)), []).append(question)
            self.by_id.setdefault(own, []).append(question)
        self.taken: dict[Key, int] = {}

    def place(self, record: Mapping[str, Any], number: int) -> str:
        """The uid of the question a record answers."""
        if "uid" in record:
            uid = self.uids.get(_unnamed(record["uid"]))
            if uid is None:
                raise ValueError(
                    f"answer {number} is to {record['uid']!r}, which is not asked here: "
                    "the answers belong to another question file"
                )
            return uid
        own = str(record.get("question_id"))
        asked = self.by_id.get(own)
        if not asked:
            raise ValueError(
                f"answer {number} is to question {record.get('question_id')!r}, which is not asked "
                "here: the answers belong to another question file"
            )
        prompt = _plain(str(record.get("prompt", "")))
        same = self.by_prompt.get((own, prompt))
        if same:
            # One question asked twice: its answers are given out in turn.
            turn = self.taken.get((own, prompt), 0)
            self.taken[own, prompt] = turn + 1
            return same[turn % len(same)].uid
        if len(asked) == 1 and _agrees(prompt, _plain(asked[0].text)):
            return asked[0].uid
        raise ValueError(
            f"answer {number} to question {own!r} was asked {record.get('prompt')!r}, here it is "
            f"{asked[0].text!r}: the answers belong to another question file"
        )


def _unnamed(uid: str) -> str:
    """Place and hash of the question: what a uid says beside the set's name."""
    return ":".join(uid.rsplit(":", 2)[-2:])


def _plain(text: str) -> str:
    """A prompt without the mark of the picture and outer white space."""
    return text.replace("<image>", "").strip()


def _agrees(prompt: str, asked: str) -> bool:
    """Some scripts record the prompt without its suffix, or none."""
    return prompt in asked or asked in prompt
