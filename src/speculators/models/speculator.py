"""The base of all drafts as transformers models: loading, the verifier, generation.

A family's model adds its layers, ``draft`` and ``logits``.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from typing_extensions import Self

from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.hub.client import watched_client
from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.checkpoint.verifier import Verifier, check_loaded, open_verifier
from speculators.decode import Generation, VerifiedStep, Workspace, speculate
from speculators.errors import FormatError, SpeculatorsError, VerifierError
from speculators.families.converted import Converted, open_converted
from speculators.format.config import ProposalMethod
from speculators.format.proposals import proposal_method, resized
from speculators.models.blocks import upcast, upcast_parameters
from speculators.models.config import SpeculatorPretrainedConfig
from speculators.models.inputs import check_labels, check_mask, check_prompts, check_states
from speculators.models.layers import causal_inputs, frozen_linear
from speculators.models.misuse import NotAnAssistant, refuse_pipeline
from speculators.models.output import DraftOutput, the_cache
from speculators.models.placement import device_of, products_of, rows_of
from speculators.models.saving import SavableDraft
from speculators.models.tensors import map_tensor, most_used_dtype

__all__ = ["Speculator"]

AUTO = "auto"
"""As a verifier: the one that the draft's config names."""

BY_ENVIRONMENT = {
    "local_files_only": "HF_HUB_OFFLINE",
    "force_download": "another cache_dir",
    "proxies": "HTTPS_PROXY",
}
"""transformers' download options → what to use instead of them."""


class Speculator(SavableDraft, ABC):
    """A draft, with what it borrows from its verifier.

    A subclass sets ``config_class``, builds its modules in ``__init__`` (among them ``fc``, whose
    device and dtype are those of the draft, and ``rotary_emb``, if its layers attend) before it
    calls ``post_init``, and defines ``draft`` and ``logits``.

    Args:
        config: of the family's config class.
        own_embedding: whether the draft has its own embedding; otherwise it uses the verifier's.

    """

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_save = {  # noqa: RUF012
        "borrowed_head.weight",
        "borrowed_embedding.weight",
    }

    generation_config = NotAnAssistant()  # type: ignore[no-untyped-call]

    fc: nn.Linear
    rotary_emb: nn.Module
    embed_tokens: nn.Embedding | None
    d2t: Tensor | None

    def __init__(self, config: SpeculatorPretrainedConfig, own_embedding: bool = True) -> None:
        super().__init__(config)
        # transformers chooses an attention implementation only for the config of a whole model.
        config.layer._attn_implementation = config._attn_implementation
        sizes = config.layer
        self.embed_tokens = (
            nn.Embedding(sizes.vocab_size, sizes.hidden_size) if own_embedding else None
        )
        # The draft's own head, if it has one.
        self.lm_head: nn.Linear | None = None
        # Added to the draft's token ids, they give the verifier's; the same without it.
        self.register_buffer("d2t", None)
        # Single matrices that are read from the verifier's files, and never saved with the draft.
        self.borrowed_head: nn.Linear | None = None
        self.borrowed_embedding: nn.Embedding | None = None
        # Not a submodule: moving or casting the draft must not touch the verifier.
        self._verifier: tuple[PreTrainedModel, ...] = ()
        self._workspace = Workspace()

    @classmethod
    def can_generate(cls) -> bool:
        """Whether transformers' own generation works with it: it does not.

        Raises:
            GenerationError: if a pipeline asks, which would go on all the same.

        """
        refuse_pipeline(cls.__name__)
        return False

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs; ``device_map`` may keep weights elsewhere."""
        return device_of(self.fc)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        verifier: PreTrainedModel | str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a converted draft, with the head (and embedding) that it takes from its verifier.

        To generate with it, load its verifier too:
        ``from_pretrained("./converted", verifier="auto")``.

        Args:
            pretrained_model_name_or_path: the directory or Hub id of a converted draft; the layout
                of speculators 0.1.0 to 0.3.0 is supported too.
            verifier: a verifier to attach: a loaded model, its directory or Hub id, or ``"auto"``
                for the one that the config names; see ``attach_verifier``. If not given, only the
                matrices that the draft needs are read from the verifier that the config names. If
                they are not available, a warning is logged and the draft has no logits until a
                verifier is attached.
            cache_dir: where downloads are kept.
            revision: a branch, tag or commit of the draft on the Hub.
            token: an access token for the Hub, for the draft and its verifier; ``False`` for none;
                the one that the Hub's client finds if not given.
            **kwargs: as for ``PreTrainedModel.from_pretrained``: ``dtype``, ``device_map``,
                ``attn_implementation``, ... Other settings of downloads come from the environment
                variables of the Hub client (``HF_HUB_OFFLINE``); ``local_files_only`` and similar
                arguments have no effect, and a warning says so.

        Raises:
            FormatError: if it is not a converted draft, or its tensors are not those of its config.
            CheckpointError, HubError: if it cannot be read or downloaded.
            VerifierError: if the verifier does not fit.

        """
        for option, instead in BY_ENVIRONMENT.items():
            if kwargs.pop(option, None):
                logger.warning(f"The argument {option} has no effect here: use {instead}")
        converted = open_converted(
            pretrained_model_name_or_path, HubAccess(cache_dir, token), revision=revision
        )
        return cls.from_converted(converted, verifier=verifier, **kwargs)

    @classmethod
    def from_converted(
        cls,
        converted: Converted,
        *,
        verifier: PreTrainedModel | Verifier | str | os.PathLike[str] | None = None,
        upcasting: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a draft that has been opened already; see ``from_pretrained``.

        A ``Verifier`` is not attached; the matrices that the draft needs are read from its files.
        With ``upcasting``, the draft computes in float32 whatever dtype it is stored in, and its
        matrices stay in their files: they are upcast in blocks where they are used.
        """
        if converted.family is not cls.config_class.family:
            raise FormatError(
                f"{converted.checkpoint.name} holds {converted.family.signature.title}; load it "
                "with speculators.models.load_draft, which picks the class."
            )
        config = kwargs.pop("config", None) or cls.config_class.from_dict(
            converted.checkpoint.config
        )
        kwargs["dtype"] = kwargs.pop("torch_dtype", None) or kwargs.get("dtype", "auto")
        if upcasting:
            kwargs["dtype"] = most_used_dtype(converted.tensors.values())
        model: Self = super().from_pretrained(
            converted.directory,
            config=config,
            own_embedding="embedding" in converted.features,
            key_mapping={
                f"^{old.replace('.', '[.]')}": new
                for old, new in converted.family.names.older.items()
            },
            **kwargs,
        )
        # Otherwise save_pretrained would undo the renaming and write names of the older layout.
        model._weight_conversions = []  # type: ignore[assignment]
        if upcasting:
            upcast_parameters(model, converted.tensors)
        if verifier is None or isinstance(verifier, Verifier):
            model._borrow(converted, verifier, upcasting)
        else:
            named = converted.config.speculators_config.verifier.name_or_path
            attached = named if verifier == AUTO else verifier
            if attached is None:
                raise VerifierError(
                    f"The config.json of {converted.checkpoint.name} names no verifier: give the "
                    "model that the draft was trained for, as verifier=..."
                )
            hub = converted.repository.hub
            model.attach_verifier(attached, cache_dir=hub.cache_dir, token=hub.token)
        return model

    def attach_verifier(
        self,
        verifier: PreTrainedModel | str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
    ) -> PreTrainedModel:
        """Attach a verifier; the draft uses its head (and its embedding, if the draft has none).

        Its tensors are shared, not copied, and it keeps its own device and dtype: moving or
        casting the draft does not affect it.

        Args:
            verifier: a loaded model, or the directory or Hub id to load one from.
            cache_dir: where downloads are kept.
            token: an access token for the Hub; the one that its client finds if not given.

        Returns:
            The verifier.

        Raises:
            VerifierError: if it is not complete, it has no output head, its hidden size or
                vocabulary is not the draft's, or its weights are not loaded.

        """
        if not isinstance(verifier, PreTrainedModel):
            self._check_fits(open_verifier(verifier, HubAccess(cache_dir, token)))
            # Not by device_map, which needs another package.
            with watched_client():  # so that no password in an endpoint's URL is logged
                load: Any = AutoModelForCausalLM.from_pretrained
                loaded, found = load(
                    verifier,
                    dtype="auto",
                    cache_dir=cache_dir,
                    token=token,
                    output_loading_info=True,
                )
            check_loaded(str(verifier), found["missing_keys"])
            whole: PreTrainedModel = loaded.to(self.device)
            verifier = whole
        head = verifier.get_output_embeddings()
        if head is None:
            raise VerifierError(
                f"{type(verifier).__name__} has no output head; attach a causal language model."
            )
        if device_of(head).type == "meta":
            raise VerifierError(
                f"The weights of {type(verifier).__name__} have no values (they are on the meta "
                "device); load them first: AutoModelForCausalLM.from_pretrained(...)"
            )
        expected = self.config.checked().verifier_sizes
        if tuple(head.weight.shape) != expected:
            raise VerifierError(
                f"The draft does not fit {type(verifier).__name__}: its vocabulary and hidden size "
                f"are {describe_shape(expected)}, the verifier's "
                f"{describe_shape(tuple(head.weight.shape))}; "
                "attach the model that it was trained for."
            )
        self.borrowed_head = self.borrowed_embedding = None
        self._verifier = (verifier,)
        self._workspace = Workspace()
        return verifier

    def detach_verifier(self) -> None:
        """Release the verifier; the draft has no logits until another one is attached."""
        self._verifier = ()
        self._workspace = Workspace()

    @property
    def verifier(self) -> PreTrainedModel | None:
        """The attached verifier, if there is one."""
        return self._verifier[0] if self._verifier else None

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """Which of the verifier's states the draft reads.

        Number i is the residual stream that enters the verifier's decoder layer i. Empty for the
        last hidden state, after the final norm.
        """
        return ()

    @property
    def verifier_vocab_size(self) -> int:
        """The size of the verifier's vocabulary."""
        vocabulary: int = self.config.layer.vocab_size
        return vocabulary

    def project(self, hidden_states: Tensor) -> Tensor:
        """What the draft's first input is made of, from the verifier's states: here, themselves.

        Args:
            hidden_states: (batch, sequence, width of all states that the draft reads).

        """
        return hidden_states

    def to_verifier(self, tokens: Tensor) -> Tensor:
        """The verifier's ids of the draft's tokens, of any shape."""
        return tokens if self.d2t is None else tokens + self.d2t[tokens]

    @abstractmethod
    def draft(self, input_ids: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` without the head; ``logits`` is ``None`` in the output.

        ``hidden_states`` are projected, or an earlier output's ``last_hidden_state``.
        """

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the head, as ``forward`` does after the layers.

        Args:
            hidden_states: (batch, sequence, hidden), ``last_hidden_state`` or a part of it.

        Returns:
            (batch, sequence, draft vocabulary), in the head's dtype and on its device.

        Raises:
            VerifierError: as ``forward``.

        """
        return products_of(self._head(), hidden_states)

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        draft_states: Tensor | None = None,
        **kwargs: Any,
    ) -> DraftOutput | tuple[Any, ...]:
        """Compute the draft's logits from tokens and the verifier's hidden states.

        Position t takes token t+1 and the verifier's hidden states at token t, and predicts token
        t+2. Attention is causal unless a 4D mask is given.

        Args:
            input_ids: (batch, sequence), integers.
            hidden_states: the verifier's, of any floating dtype: the last one after the final norm,
                (batch, sequence, hidden); or, for a draft with ``verifier_layers``, their states
                concatenated, (batch, sequence, layers * hidden).
            attention_mask: (batch, past + sequence), 1 for tokens and 0 for padding; or a 4D mask,
                (batch, 1, sequence, past + sequence), which is used unchanged.
            position_ids: (batch, sequence); if not given, they continue from the cache.
            past_key_values: the cache that an earlier call returned.
            use_cache: return a cache; implied by ``past_key_values``.
            return_dict: ``False`` for a tuple instead of a ``DraftOutput``.
            logits_to_keep: compute logits for this many positions at the end; 0 for all.
            cache: the other name of ``past_key_values``.
            draft_states: (batch, sequence, draft width), an earlier output's ``last_hidden_state``
                in place of ``hidden_states``.
            **kwargs: passed on to the attention.

        Raises:
            InputError: if not exactly one of ``hidden_states`` and ``draft_states`` is given, their
                shape does not go with ``input_ids`` and the draft, or ``labels`` are given.
            VerifierError: if there is no head (or embedding), because no verifier is attached and
                the one that the config names was not available.

        """
        self._head()  # fail before the work, not after it
        check_labels(kwargs)
        check_states(
            input_ids,
            hidden_states=(hidden_states, self._states_width),
            draft_states=(draft_states, self.config.layer.hidden_size),
        )
        cache = the_cache(cache, past_key_values)
        if attention_mask is not None:
            check_mask(
                attention_mask, input_ids, int(cache.get_seq_length()) if cache is not None else 0
            )
        if hidden_states is not None:
            draft_states = self.project(hidden_states)
        assert draft_states is not None
        drafted = self.draft(
            input_ids,
            draft_states,
            attention_mask,
            position_ids,
            cache,
            use_cache,
            **kwargs,
        )
        assert drafted.last_hidden_state is not None
        output = DraftOutput(
            logits=self.logits(drafted.last_hidden_state[:, -logits_to_keep:]),
            last_hidden_state=drafted.last_hidden_state,
            cache=drafted.cache,
        )
        return output if return_dict is not False else output.to_tuple()

    def generate(
        self,
        input_ids: Tensor,
        *,
        proposal: ProposalMethod | str | None = None,
        num_draft_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        cuda_graphs: bool = True,
        on_step: Callable[[VerifiedStep], None] | None = None,
        **kwargs: Any,
    ) -> Tensor | Generation:
        """Generate what the attached verifier's own ``generate`` would, in fewer verifier passes.

        Greedy output equals the verifier's token for token, except where rounding decides between
        tokens that are equally good; sampled output has the verifier's distribution.

        Args:
            input_ids: (batch, length), prompts, padded at the left.
            proposal: how to propose: a method, or its type, which is looked up in the config; the
                config's default if not given.
            num_draft_tokens: the number of tokens to propose per verifier pass, in place of the
                method's ``speculative_tokens``.
            generation_config: as for the verifier's ``generate``, with the same defaults.
            cuda_graphs: replay steps as CUDA graphs where possible: with both models on one GPU.
                The graphs and their caches are kept for later calls, until another verifier is
                attached.
            on_step: called after each pass of the verifier, for each prompt that has not ended,
                with what was proposed and what was accepted.
            **kwargs: as for the verifier's ``generate``: ``attention_mask``, ``max_new_tokens``,
                ``eos_token_id``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``streamer``, ``return_dict_in_generate``, ...

        Returns:
            (batch, length), prompts and generated tokens, padded at the right; or a
            ``Generation`` if ``return_dict_in_generate`` is set.

        Raises:
            VerifierError: if no verifier is attached.
            InputError: if ``input_ids`` are not prompts of tokens that the verifier has.
            GenerationError: if the settings, the proposal or the verifier do not allow it.

        """
        if self.verifier is None:
            raise VerifierError(
                "Generating needs the whole verifier. Attach the verifier first: "
                f"{self._how_to_attach()}, or load both at once: "
                f"{type(self).__name__}.from_pretrained({str(self.name_or_path)!r}, "
                "verifier='auto')"
            )
        check_prompts(input_ids, kwargs.get("attention_mask"), self.verifier_vocab_size)
        generation = speculate(
            self,
            self.verifier,
            input_ids,
            proposal=self.proposal_method(proposal, num_draft_tokens),
            generation=generation_config,
            workspace=self._workspace if cuda_graphs else None,
            on_step=on_step,
            **kwargs,
        )
        asked = [
            kwargs.get("return_dict_in_generate"),
            getattr(generation_config, "return_dict_in_generate", None),
            self.verifier.generation_config.return_dict_in_generate,
        ]
        as_dict = next((setting for setting in asked if setting is not None), False)
        return generation if as_dict else generation.sequences

    def proposal_method(
        self, proposal: ProposalMethod | str | None = None, num_draft_tokens: int | None = None
    ) -> ProposalMethod:
        """The proposal method that ``generate`` would use with these arguments.

        Raises:
            GenerationError: if there is no such type, or it cannot draft so many tokens.

        """
        if not isinstance(proposal, ProposalMethod):
            return proposal_method(self.config.speculators, proposal, num_draft_tokens)
        return proposal if num_draft_tokens is None else resized(proposal, num_draft_tokens)

    def get_input_embeddings(self) -> nn.Embedding | None:  # type: ignore[override]
        """The draft's own embedding, or the verifier's, or ``None``."""
        if self.embed_tokens is not None:
            return self.embed_tokens
        if self.verifier is not None:
            embedding: nn.Embedding = self.verifier.get_input_embeddings()  # type: ignore[assignment]
            return embedding
        return self.borrowed_embedding

    def get_output_embeddings(self) -> nn.Linear | None:
        """The draft's own head, or the verifier's, or ``None``."""
        if self.lm_head is not None:
            return self.lm_head
        if self.verifier is not None:
            head: nn.Linear = self.verifier.get_output_embeddings()
            return head
        return self.borrowed_head

    def _attention_inputs(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
    ) -> tuple[Cache | None, dict[str, Any]]:
        """What the draft's layers take besides their input.

        Args:
            x: (batch, sequence, hidden), the first layer's input.
            attention_mask: as for ``forward``, as all others are.
            position_ids: continue from the cache if not given.
            cache: of the layers.
            use_cache: make a cache if there is none.

        Returns:
            the cache, and keyword arguments for each layer.

        """
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.layer)
        inputs = causal_inputs(self.config.layer, x, attention_mask, position_ids, cache)
        rotation = self.rotary_emb(x, position_ids=inputs["position_ids"])
        return cache, {**inputs, "use_cache": cache is not None, "position_embeddings": rotation}

    def _head(self) -> nn.Linear:
        head = self.get_output_embeddings()
        if head is None:
            raise VerifierError(
                "The draft has no head of its own: its verifier's makes the logits. "
                f"Attach the verifier first: {self._how_to_attach()}"
            )
        return head

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedding = self.get_input_embeddings()
        if embedding is None:
            raise VerifierError(
                "The draft has no embedding of its own and its verifier is not there. "
                f"Attach the verifier first: {self._how_to_attach()}"
            )
        embedded = rows_of(embedding, input_ids)
        return embedded.to(device=self.device, dtype=self.fc.weight.dtype)

    @cached_property
    def _states_width(self) -> int:
        """The width of what ``forward`` takes of the verifier."""
        _, width = self.config.checked().verifier_sizes
        return width * max(len(self.verifier_layers), 1)

    def _how_to_attach(self) -> str:
        """A complete call, with the verifier that the config names."""
        named = self.config.speculators.verifier.name_or_path
        return f"draft.attach_verifier({named or 'ORGANIZATION/VERIFIER'!r})"

    def _check_fits(self, verifier: Verifier) -> None:
        vocabulary, hidden = self.config.checked().verifier_sizes
        verifier.check_fits(hidden, vocabulary)

    def _borrow(self, converted: Converted, verifier: Verifier | None, upcasting: bool) -> None:
        """Read the matrices that the draft lacks from its verifier's files, or warn without them.

        The verifier is the one that the config names, if none is given.
        """
        borrows = self.config_class.family.borrows
        borrows_head = "head" in borrows and self.lm_head is None
        borrows_embedding = "embedding" in borrows and self.embed_tokens is None
        if not borrows_head and not borrows_embedding:
            return

        def read(tensor: Callable[[], TensorInfo]) -> Tensor | None:
            try:
                info = tensor()
            except SpeculatorsError as error:
                unread.append(str(error))
                return None
            mapped = map_tensor(info)
            return upcast(mapped) if upcasting else mapped.to(self.device, self.fc.weight.dtype)

        unread: list[str] = []
        try:
            verifier = verifier or converted.open_verifier()
            self._check_fits(verifier)
        except SpeculatorsError as error:
            unread.append(str(error))
        else:
            head = read(verifier.head) if borrows_head else None
            if head is not None:
                self.borrowed_head = frozen_linear(head)
            embedding = read(verifier.embedding) if borrows_embedding else None
            if embedding is not None:
                self.borrowed_embedding = nn.Embedding.from_pretrained(embedding)
        for why in dict.fromkeys(unread):
            logger.warning(f"{why} The draft has no logits until a verifier is attached.")
