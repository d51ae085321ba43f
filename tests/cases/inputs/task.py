import torch
from torch import nn
from torch.utils.data import Dataset


class Samples(Dataset):
    """Of each kind a sample has inputs that are not one tensor, or of the kind `outputs` the model gives a dict."""

    def __init__(self, count, kind):
        self.count, self.kind = count, kind

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 3
        tokens = torch.randint(1, 30, (16,), generator=generator) + 20 * label
        inputs = {
            "bert": {"input_ids": tokens, "attention_mask": torch.ones(16, dtype=torch.long)},
            "gru": (tokens, 5 + index % 10),
            "towers": (index % 20, (index * 7) % 30),
            "towers_t": (torch.tensor(index % 20), torch.tensor((index * 7) % 30)),
            "two_images": (torch.randn(4, generator=generator), torch.randn(4, generator=generator) + label),
            "outputs": tokens,
            "extras": tokens,
        }[self.kind]
        return (inputs, label, {"where": "here"}) if self.kind == "extras" else (inputs, label)


def build_data(kind):
    return {"train": Samples(96, kind), "val": Samples(48, kind), "test": Samples(48, kind)}


class Tokens(nn.Module):
    """One embedding for each token, and the mean of all; as a Hugging Face model does, it takes and gives mappings."""

    def __init__(self, *, takes_mapping=False, gives_mapping=False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(100, 16), nn.Linear(16, 3)
        self.takes_mapping, self.gives_mapping = takes_mapping, gives_mapping

    def forward(self, batch):
        tokens = batch["input_ids"] if self.takes_mapping else batch
        logits = self.head(self.embedding(tokens).mean(1))
        return {"loss": None, "logits": logits} if self.gives_mapping else logits


class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(100, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, batch):
        tokens, lengths = batch
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(self.gru(packed)[1][-1])


class Towers(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.one, self.other, self.head = make(), make(), nn.Linear(16, 3)

    def forward(self, batch):
        one, other = batch
        return self.head(torch.cat([self.one(one), self.other(other)], -1))


def build_model(kind):
    match kind:
        case "bert":
            return Tokens(takes_mapping=True)
        case "outputs":
            return Tokens(gives_mapping=True)
        case "extras":
            return Tokens()
        case "gru":
            return Gru()
        case "two_images":
            return Towers(lambda: nn.Linear(4, 8))
        case _:
            return Towers(lambda: nn.Embedding(50, 8))


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())
