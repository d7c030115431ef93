"""Held-out samples read in one direction: what GLM is worth as a left-to-right language model.

The first GLM paper evaluates language modelling twice (arXiv 2103.10360, section 3.3): with the context read in both
directions, as a [gMASK] sample has it, and in one. Here the second is the same model on the same targets, with the
[gMASK] in front of the text: context and targets are all generated, each token sees what stands before it, and the
loss counts the targets alone. Training has met such samples, for a [gMASK] may hide its whole row.
"""

from data_prep.assemble import Layout
from data_prep.batch import GMASK, Sample
from data_prep.dataset import Stream
from data_prep.errors import ConfigError
from data_prep.samples import Sampler


class OneWaySampler(Sampler):
    """A sampler whose gMASK samples show their context from the left only; samples of other kinds stay as they are."""

    def sample(self, index: int) -> Sample:
        """The sample of an index: row and targets are those of `Sampler.sample`. Raises ConfigError for documents that
        are isolated: each has a context of its own."""
        both_ways = super().sample(index)
        address = self.address(index)
        if address.kind != GMASK:
            return both_ways
        if self.config.isolate_documents or not isinstance(address.stream, Stream):
            raise ConfigError("context=one_way is for joined documents; this run has data.sampling.isolate_documents")
        layout = Layout.empty(self.sequence_length, self.dataset.tokenizer.eod)
        text = address.stream.read_row(address.row)[: self.sequence_length - 1 - self._opening]
        self._assembler.prefix(layout, text, len(text))
        layout.is_target[: layout.used - int((both_ways.loss_weight > 0).sum())] = False
        return self._finished(layout, GMASK, address.stream.info.lang, index)
