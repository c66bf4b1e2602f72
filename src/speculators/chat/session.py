"""A conversation with a verifier whose draft drafts for it."""

import time
from collections.abc import Callable

import torch

from speculators.chat.answer import Answer, Drafted, Piece, Spelling, Step
from speculators.decode import VerifiedStep
from speculators.evaluate.prompts import Message, Prompt
from speculators.evaluate.subject.loading import Subject
from speculators.format.config import ProposalMethod

__all__ = ["Session"]


class Session:
    """A conversation, which each answer continues.

    Args:
        subject: the draft, its verifier and the tokenizer.
        proposal: how to propose.
        system: the system message, if any.
        max_new_tokens: the longest answer, in tokens.
        temperature: for sampling from the verifier's whole distribution, as an evaluation does;
            0 means greedy decoding.

    Attributes:
        answers: those given so far; the last one may have been interrupted.

    """

    def __init__(
        self,
        subject: Subject,
        proposal: ProposalMethod,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        self.subject = subject
        self.proposal = proposal
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.answers: list[Answer] = []
        self._messages = [] if system is None else [Message(role="system", content=system)]

    def answer(self, said: str, show: Callable[[Piece], None]) -> Answer:
        """Answer what was said, and add both to the conversation.

        Args:
            said: the user's message.
            show: receives the text piece by piece, as it comes.

        Raises:
            PromptsError: if the verifier's tokenizer refuses the conversation.
            GenerationError: if it cannot be decoded.

        """
        subject, messages = self.subject, [*self._messages, Message(role="user", content=said)]
        tokens = subject.verifier.encode(
            Prompt(id="here", category="chat", messages=tuple(messages))
        )
        input_ids = torch.tensor([tokens], device=subject.verifier.device)
        answer, decode = Answer(prompt=said), subject.verifier.tokenizer.decode
        spelling = Spelling(lambda tokens: str(decode(list(tokens), skip_special_tokens=True)))
        self.answers.append(answer)
        began = time.perf_counter()

        def note(step: VerifiedStep) -> None:
            noted = self._step(step, spelling)
            answer.steps.append(noted)
            answer.seconds = time.perf_counter() - began
            for piece in noted.pieces:
                show(piece)

        # Otherwise the verifier's generation_config would cut the distribution.
        sampling = {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "top_p": 1.0,
        }
        subject.draft.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            proposal=self.proposal,
            max_new_tokens=self.max_new_tokens,
            on_step=note,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )
        answer.seconds = time.perf_counter() - began
        if answer.text:
            messages.append(Message(role="assistant", content=answer.text))
        self._messages = messages
        return answer

    def _step(self, step: VerifiedStep, spelling: Spelling) -> Step:
        accepted = set(step.accepted)
        drafted = tuple(
            Drafted(self._text_of(token), parent, index in accepted)
            for index, (token, parent) in enumerate(zip(step.drafted, step.parents, strict=True))
        )
        known = len(step.accepted)
        pieces = spelling.pieces((token, place < known) for place, token in enumerate(step.added))
        own = self._text_of(step.added[known]) if len(step.added) > known else None
        return Step(drafted, len(step.added), tuple(pieces), own)

    def _text_of(self, token: int) -> str:
        return str(self.subject.verifier.tokenizer.decode([token]))
