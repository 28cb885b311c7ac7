"""What a backbone must answer so that denoising tasks can train it, and the registry of those that answer.

Nothing here depends on a host. What the backbones of one host have in common, such as the names of their arguments, is
in that host's package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.metadata import entry_points
from typing import Any, ClassVar

from torch import Tensor, nn

from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.hooks import RecomputeInContext, StateOfPass, replaced
from fairchem_scd.errors import ConfigError


class Adapter(ABC):
    """The answers of one class of backbones. An object of it belongs to one backbone.

    Every adapter says how the backbone predicts vectors. For SCD it also says which features are embedded and which
    blocks a condition modulates (`scalar_channels`, `scalars`, `blocks`, `modulated`, `element_embeddings`); for DeNS
    where forces are added to the atoms' features (`encoding_spec`, `encoded`). A task whose questions have no answer is
    refused with the reason.

    Class attributes:
        host_class: the class of the backbones. Subclasses of it do not count, since they may compute something else.
        names: the names by which configs call it.
    """

    host_class: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    # --- vectors, energies and forces ---------------------------------------------------------------------------------

    @abstractmethod
    def vector_head(self) -> nn.Module:
        """A new head, called with (data, embedding), that returns {any name: [N, 3] one vector for each atom}.

        It predicts the noise. It is a new instance of the class that predicts direct forces from this backbone, or an
        EdgeVectorHead where there is none.
        """

    @property
    def conservative(self) -> bool:
        """Whether the backbone is set up for forces that are the negative gradient of the energy. False by default."""
        return False

    def skip_energy_readout(self) -> AbstractContextManager[None]:
        """While entered, a pass runs in which no output is read but the vectors of `vector_head` and `scalars`.

        A conservative backbone need not prepare for derivatives with respect to positions there, and layers that only
        the energy needs can be left out.
        """
        return nullcontext()

    def readout(self) -> Iterable[nn.Module]:
        """Parts of the backbone that neither `vector_head` nor `scalars` depends on, but only the host's heads."""
        return ()

    def scalar_layers(self, head: nn.Module) -> Sequence[nn.Module]:
        """The last layers, of a head or of the backbone's `readout`, that a head's scalar outputs come from.

        With their parameters zero these outputs are zero; vectors that are no gradients of them stay as they are. Empty
        for heads without scalar outputs, and where it is not known.
        """
        return ()

    # --- features -----------------------------------------------------------------------------------------------------

    @property
    def scalar_channels(self) -> int:
        """Number C of l = 0 features of an atom, of all resolutions together."""
        raise self._cannot("embed")

    def scalars(self, embedding: Any) -> Tensor:
        """[N, C] l = 0 features of the atoms after the last block, from what the backbone's forward returned."""
        raise self._cannot("embed")

    def element_embeddings(self) -> Iterable[nn.Module]:
        """The modules that turn an atom's element into its first features. They are frozen in pre-training."""
        raise self._cannot("embed elements")

    # --- the condition of SCD -----------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that a condition can modulate, in the order in which they run."""
        raise self._cannot("modulate")

    @property
    def num_modulated(self) -> int:
        """Number of blocks that a condition can modulate."""
        return len(self.blocks)

    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> AbstractContextManager[None]:
        """While entered, a block is modulated.

        The block's message part gets `modulation.scalars(index, x)` in place of its l = 0 features x [n, C], after the
        norm where there is one; of the update dx [n, C] that it computes from them, `modulation.update(index, dx)`
        is added to the residual stream. Each call of the former is followed by one of the latter. What the residual
        stream itself carries stays as it is.

        Args:
            block: one of `blocks`.
            index: its place there.
            modulation: the condition of each atom in this pass.
        """
        raise self._cannot("modulate")

    # --- the condition of DeNS ----------------------------------------------------------------------------------------

    @property
    def encoding_spec(self) -> dict[str, Any]:
        """The arguments of a ForceEncoding for this backbone: `lmax_list`, `channels`, `bound`, perhaps `weight_decay`.

        Raises:
            ConfigError: the atoms have no features that rotate with the structure.
        """
        raise self.cannot_condition_on_forces()

    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        """While entered, `encoding` [N, Σ(lmax+1)², C] is added to the atoms' features before the first block."""
        raise NotImplementedError(f"{type(self).__name__} has an encoding_spec, and so needs encoded")

    @classmethod
    def cannot_condition_on_forces(cls) -> ConfigError | None:
        """The reason why forces cannot be a condition of this backbone; None if they can."""
        if cls.encoding_spec is not Adapter.encoding_spec:
            return None
        return ConfigError(
            f"{key_of()}: {cls.names[0]} has no vector features, which dens and scd with condition: [forces] need "
            "to pass forces to the model; scd with its default condition and noisy_nodes work there"
        )

    # --- a pass -------------------------------------------------------------------------------------------------------

    def recomputed(self, heads: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, str]]:
        """Where the host hands modules to activation checkpointing, which runs them again in backward.

        Args:
            heads: the heads that run in the pass.

        Returns:
            Pairs of an object and the name of its attribute that holds such a module, or a ModuleList of them.
        """
        return ()

    def state_of_pass(self) -> StateOfPass[Any] | None:
        """What the `recomputed` modules read from the backbone and the next pass overwrites; None: nothing."""
        return None

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        """While entered, one pass runs, with all blocks modulated.

        Modules that activation checkpointing runs again in backward, after this context was left and other passes were
        run, compute there what they computed in this pass.

        Args:
            modulation: the condition of each atom; None: there is no condition, and nothing is changed.
            heads: the heads that run in this pass.
        """
        contexts: dict[Any, Callable[[], AbstractContextManager[None]]] = {}
        if modulation is not None:
            contexts = {block: partial(self.modulated, block, i, modulation) for i, block in enumerate(self.blocks)}
        state = self.state_of_pass()

        def stand_in(run: Callable[..., Any]) -> RecomputeInContext:
            entered = [] if state is None else [state.restored]
            return RecomputeInContext(run, *entered, *([contexts.pop(run)] if run in contexts else []))

        with ExitStack() as stack:
            for owner, name in list(self.recomputed(heads)):
                module = getattr(owner, name)
                several = isinstance(module, nn.ModuleList)
                stack.enter_context(replaced(owner, name, [*map(stand_in, module)] if several else stand_in(module)))
            for context in contexts.values():  # of the blocks that run once
                stack.enter_context(context())
            yield

    def _cannot(self, what: str) -> ConfigError:
        return ConfigError(
            f"{key_of('scd')}: {type(self).__name__}, the adapter of {self.names[0]}, does not say how to {what}; "
            "it needs scalar_channels, scalars, element_embeddings, blocks and modulated: see "
            "docs/adding-a-backbone.md. With condition: [] nothing is embedded"
        )


_ADAPTERS: dict[type[nn.Module], type[Adapter]] = {}


def register_adapter(cls: type[Adapter]) -> type[Adapter]:
    """Make an adapter known for its `host_class`. It replaces the one that was known for it before, if any."""
    _ADAPTERS[cls.host_class] = cls
    return cls


def adapters() -> Sequence[type[Adapter]]:
    """All known adapters."""
    return list(_ADAPTERS.values())


def known_backbones() -> list[str]:
    """Names of the backbones that have an adapter."""
    return sorted(name for cls in adapters() for name in cls.names)


def adapter_class(host_class: type[nn.Module]) -> type[Adapter]:
    """The adapter of a class of backbones.

    Where none is registered, the modules are imported that installed packages name under the entry point
    `fairchem_scd.adapters`.

    Raises:
        ConfigError: there is none; the message lists the known backbones and says how to add one.
    """
    if host_class not in _ADAPTERS:
        for found in entry_points(group="fairchem_scd.adapters"):
            found.load()
    if host_class not in _ADAPTERS:
        raise ConfigError(
            f"model.backbone: no adapter for {host_class.__module__}.{host_class.__qualname__}; "
            f"known backbones: {', '.join(known_backbones())}. "
            "To add one, write an adapter for it: see docs/adding-a-backbone.md."
        )
    return _ADAPTERS[host_class]


def adapter_for(backbone: nn.Module) -> Adapter:
    """The adapter of a backbone. Raises ConfigError if there is none."""
    return adapter_class(type(backbone))(backbone)
