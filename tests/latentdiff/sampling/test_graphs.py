"""What surrounds CUDA graphs in drawing, with a stand-in that calls the function again; tests/gpu has the real ones."""

import copy

import pytest
import torch

from latentdiff import LatentPipeline
from latentdiff.config import load_config
from latentdiff.sampling import graphs
from latentdiff.sampling.graphs import Graph, Graphs
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE


class Recording(Graphs):
    """Keeps what a recorded call reads and writes in one place, as a CUDA graph does."""

    def _record(self, function, inputs):
        inputs = [each.clone() for each in inputs]
        results = [each.clone() for each in function(inputs)]

        class Recorded:
            def replay(self):
                for result, value in zip(results, function(inputs), strict=True):
                    result.copy_(value)

        return Graph(Recorded(), inputs, results)


@pytest.fixture
def pipe(monkeypatch):
    config = load_config("debug")
    encoder = TextEncoder.new(
        config.text_encoder.build(), train_tokenizer(["a red apple"] * 2, vocab_size=60, max_length=16)
    )
    unet = UNet(config.unet.build(4, encoder.context_dim, 16))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    found = LatentPipeline(vae=VAE(config.vae.build(32)), unet=unet, text_encoder=encoder,
                           schedule=config.diffusion.build())  # fmt: skip
    real = graphs.describe
    monkeypatch.setattr(graphs, "describe", lambda model, device: real(model, torch.device("cuda")))
    return found


def on(pipe, recorder, prompts, **options):
    pipe.graphs = recorder
    pipe.network.graphs = recorder
    return list(pipe.stream(prompts, num_steps=4, seed=1, **options))[-1].x


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"guidance_interval": (0.3, 5.0), "sampler": "ddpm"}])
def test_drawing_from_graphs_is_the_same(pipe, options):
    eager = Graphs()
    eager.enabled = False
    for prompts in ("a red apple", ["apple", "red"]):
        assert torch.equal(on(pipe, Recording(), prompts, **options), on(pipe, eager, prompts, **options))


def test_two_prompts_interleaved_and_weights_that_change(pipe):
    recorder = Recording()
    alone = [on(pipe, Recording(), prompt) for prompt in ("a red apple", "apple")]
    pipe.graphs = pipe.network.graphs = recorder
    both = list(zip(*(pipe.stream(prompt, num_steps=4, seed=1) for prompt in ("a red apple", "apple")), strict=True))
    assert [torch.equal(one, step.x) for one, step in zip(alone, both[-1], strict=True)] == [True, True]
    assert {key[0] for key in recorder.recorded} == {"context", "time", "step"}
    count = len(recorder.recorded)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    assert not torch.equal(on(pipe, recorder, "apple"), alone[1])
    assert len(recorder.recorded) == count
    pipe.unet.conv_out.bias = torch.nn.Parameter(pipe.unet.conv_out.bias.detach() - 1)
    assert torch.allclose(on(pipe, recorder, "apple"), alone[1], atol=1e-4)
    assert len(recorder.recorded) > count
    calls = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    on(pipe, recorder, "apple")
    assert len(calls) == 4


def test_what_cannot_be_recorded_is_drawn_without(pipe):
    class Broken(Graphs):
        def _record(self, function, inputs):
            raise RuntimeError("operation not permitted when stream is capturing")

    eager = Graphs()
    eager.enabled = False
    with pytest.warns(RuntimeWarning, match="drawing without CUDA graphs: operation not permitted"):
        drawn = on(pipe, Broken(), "apple")
    assert torch.equal(drawn, on(pipe, eager, "apple"))


def test_few_graphs_are_kept(pipe, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    recorder = Recording()
    for count in (1, 2, 3):
        on(pipe, recorder, ["apple"] * count)
    assert len(recorder.recorded) == 3


def test_gradients_and_large_batches_go_without(pipe, monkeypatch):
    recorder = Recording()
    assert on(pipe, recorder, "apple", enable_grad=True).requires_grad
    assert not recorder.recorded
    monkeypatch.setattr(graphs, "MAX_PIXELS", 1)
    on(pipe, recorder, "apple")
    assert {key[0] for key in recorder.recorded} == {"context", "time"}


def test_a_pipeline_can_be_copied(pipe):
    eager = Graphs()
    eager.enabled = False
    other = copy.deepcopy(pipe)
    assert other.network.graphs is other.graphs is not pipe.graphs
    assert other.network.unet is other.unet is not pipe.unet
    assert torch.equal(on(other, Recording(), "apple"), on(pipe, eager, "apple"))
