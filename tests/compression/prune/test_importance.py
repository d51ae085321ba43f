"""Which channels go: by the loss, by batch norm, by rank over all layers; and in networks of other kinds."""

import torch
from torch import nn

from heliostat.compression.history import replay
from heliostat.compression.prune.structured import structured


def test_taylor_keeps_the_channel_that_the_loss_depends_on_however_small_its_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[1:] *= 2
    model[0].bias.data[1:] = -100  # channels 1 and 2 are never active
    inputs = torch.randn(64, 4)

    def backward(copy):
        nn.functional.cross_entropy(copy(inputs), (inputs[:, 0] > 0).long()).backward()

    by_size, _ = structured(model, example=inputs, sparsity=0.6)
    by_loss, _ = structured(model, example=inputs, sparsity=0.6, importance="taylor", backward=backward)
    assert not torch.equal(by_size[0].weight, model[0].weight[:1])
    assert torch.equal(by_loss[0].weight, model[0].weight[:1])
    assert all(parameter.grad is None for parameter in by_loss.parameters())


def test_bn_scale_removes_what_batch_norm_scales_down_and_says_where_there_is_none(nets, images):
    model = nets.ConvNet()
    model.norm.weight.data[[0, 3]] = 1e-3
    model.block_norm.weight.data[[0, 3]] = 1e-3
    smaller, (step,) = structured(model, example=images, sparsity=0.25, importance="bn_scale")
    assert torch.equal(smaller.norm.weight, model.norm.weight[[1, 2, 4, 5, 6, 7]])
    assert smaller.pointwise.out_channels == 16
    assert step["kept"]["pointwise"] == "no batch norm scales its channels"


def test_ranked_together_the_weaker_layer_loses_more():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight.data[:4] *= 1e-3
    model[4].weight.data[:, :4] *= 1e-3
    smaller, _ = structured(model, example=torch.randn(1, 6), sparsity=0.25, scope="global")
    assert (smaller[0].out_features, smaller[2].out_features) == (8, 4)


def test_the_channels_of_a_grouped_convolution_go_from_every_group_alike():
    def build():
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 3))

    example = torch.randn(2, 1, 8, 8)
    smaller, history = structured(build(), example=example, sparsity=0.5)
    assert (smaller[1].in_channels, smaller[1].out_channels, smaller[1].groups) == (4, 4, 2)
    assert smaller(example).shape == (2, 2, 2, 2)
    replay(build(), history).load_state_dict(smaller.state_dict())


def test_the_width_of_an_embedding_shrinks_with_the_layer_that_reads_it():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.embedding(x).mean(1))

    smaller, history = structured(Bag(), example=torch.randint(20, (2, 5)), sparsity=0.5)
    assert (smaller.embedding.embedding_dim, smaller.head.in_features) == (4, 4)
    replay(Bag(), history).load_state_dict(smaller.state_dict())
