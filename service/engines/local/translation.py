"""Between what the service asks and says, and the plain data that an engine is told and tells."""

from __future__ import annotations

import dataclasses
import json

from service.engines.base import GenerationRequest, Prompted, ResponseFormat, TokenLogprob
from service.engines.base_model import BaseModel
from service.engines.local.messages import Choosing, Grammar, Logprob, PromptScored, Submit
from service.engines.token_text import token_texts


class Translation:
    """For one base model, whose tokenizer says what tokens mean."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._text = token_texts(base.tokenizer)

    def submit(self, request: GenerationRequest, token_ids: list[int]) -> Submit:
        """The request as the engine takes it. Raises InvalidRequest for values that cannot be served."""
        request.check()
        sampling = request.sampling
        self._base.check_tokens(sampling)
        return Submit(
            id=request.id,
            token_ids=token_ids,
            soft_prompt=request.soft_prompt.digest if request.soft_prompt else None,
            max_tokens=sampling.max_tokens,
            choosing=Choosing(**{name: getattr(sampling, name) for name in Choosing.__struct_fields__}),
            stop=list(sampling.stop),
            n=request.n,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            grammar=grammar_of(request.response_format),
            stream=request.stream,
            task=request.task,
        )

    def prompted(self, request: GenerationRequest, token_ids: list[int]) -> Prompted | None:
        """The prompt as it was laid out, where the request wants it back."""
        if not request.echo and request.prompt_logprobs is None:
            return None
        return Prompted(tuple(token_ids), self._base.text_of(token_ids))

    def scored(self, prompted: Prompted, news: PromptScored) -> Prompted:
        """The prompt with its tokens' texts and log-probabilities."""
        logprobs = tuple(self.logprob(entry) if entry is not None else None for entry in news.logprobs)
        return dataclasses.replace(prompted, logprobs=logprobs, pieces=tuple(map(self._text, prompted.token_ids)))

    def logprob(self, entry: Logprob) -> TokenLogprob:
        """A token's log-probability with what the token says."""
        top = tuple(TokenLogprob(token, logprob, (), *self._text(token)) for token, logprob in entry.top)
        return TokenLogprob(entry.token_id, entry.logprob, top, *self._text(entry.token_id))


def grammar_of(form: ResponseFormat) -> Grammar | None:
    """The grammar that an answer must follow."""
    match form.kind:
        case "text":
            return None
        case "json_object":
            return Grammar("json_schema", '{"type": "object"}')
        case "json_schema":
            schema = form.json_schema if form.json_schema is not None else {}
            return Grammar("json_schema", json.dumps(schema), form.lenient)
        case "regex":
            return Grammar("regex", form.regex or "")
        case "choice":
            return Grammar("choice", json.dumps(form.choices))
