"""What beam search cannot honour, said before anything runs. Torch-free: the front asks too."""

from __future__ import annotations

from slipstream_server.inference.generation import GenerationRequest


def unsupported_with_beams(request: GenerationRequest) -> list[tuple[str, str]]:
    """The fields of a request with ``num_beams`` > 1 that cannot be honoured, in proto spelling, and why; empty
    without beams.
    """
    beams, sampling = request.beams, request.sampling
    if beams.num_beams <= 1:
        return []
    found = []
    if sampling.do_sample and sampling.temperature > 0:
        found.append(("sampling.do_sample", "beam search does not sample"))
    if sampling.presence_penalty != 0:
        found.append(("sampling.presence_penalty", "not available with beam search; repetition_penalty is"))
    if sampling.frequency_penalty != 0:
        found.append(("sampling.frequency_penalty", "not available with beam search; repetition_penalty is"))
    if request.logprobs is not None:
        found.append(("response.logprobs", "not available with beam search"))
    if request.prompt_logprobs is not None:
        found.append(("response.prompt_logprobs", "not available with beam search"))
    if request.num_return_sequences > beams.num_beams:
        found.append(
            (
                "response.num_return_sequences",
                f"{request.num_return_sequences} is more than num_beams, which is {beams.num_beams}",
            )
        )
    if request.constraint is not None:
        found.append(("constraint", "not available with beam search"))
    if request.adapter is not None:
        found.append(("adapter", "not available with beam search"))
    return found
