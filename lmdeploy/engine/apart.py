"""Steps in which each token is computed as if its request were alone: pieces of prompts by themselves, answers by tokens."""

from __future__ import annotations

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.repeat import RepeatingScheduler
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.state import RequestState
from lmdeploy.errors import ConfigError
from lmdeploy.kernels import invariant

_PIECE = 1024  # tokens of a prompt at once


def make_deterministic(config: EngineConfig) -> None:
    """From now on no row of a product depends on the number of others. ConfigError for a batch that is too large for that."""
    if (config.max_batch_size or 0) > invariant.MAX_ROWS:
        raise ConfigError(
            f"max_batch_size={config.max_batch_size}: with deterministic give at most {invariant.MAX_ROWS}"
        )
    invariant.enable()


class ApartScheduler(RepeatingScheduler):
    """Admits and preempts as its base does."""

    @property
    def _piece(self) -> int:
        size = self.blocks.block_size
        return min(_PIECE, self.max_tokens_per_step) // size * size or self.max_tokens_per_step

    def _plan(self) -> StepPlan | None:
        """A piece of one prompt, or one token of every other request; where there is both they take turns."""
        while self._admit_next() is not None:
            pass
        wanted = [(state, self._num_tokens(state)) for state in self.running]
        pieces = [pair for pair in wanted if pair[1] > 1]
        single = [pair for pair in wanted if pair[1] == 1]
        was_piece = self._last_plan is not None and self._last_plan.num_tokens.max() > 1
        chosen = single if single and (was_piece or not pieces) else pieces[:1]
        parts = [
            self._commit(state, count) for state, count in chosen if state.block_table and self._grow(state, count)
        ]
        return StepPlan.of(self._num_scheduled_steps + 1, parts) if parts else None

    def _num_tokens(self, state: RequestState) -> int:
        """Of a request's next piece, whose borders follow from its prompt alone; of its answer one at a time."""
        computed, prompt = state.num_computed_tokens, len(state.prompt_ids)
        if computed >= prompt:
            return min(self._num_schedulable(state), 1)
        return min(prompt, (computed // self._piece + 1) * self._piece) - computed

    def _cached_prefix(self, state: RequestState) -> list[int]:
        """Blocks of whole pieces: of a smaller piece, the same keys would have other bits."""
        prefix = super()._cached_prefix(state)
        whole = self._piece // self.blocks.block_size
        return prefix[: len(prefix) // whole * whole]

    def _name_full_blocks(self, state: RequestState, num_tokens: int) -> None:
        super()._name_full_blocks(state, min(num_tokens, len(state.prompt_ids)))
