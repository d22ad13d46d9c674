"""Hugging Face's Trainer on generated text with rare tokens: the model's own loss, logit adjustment, class weights.

A token follows another because it is frequent, or because the two belong together; logit adjustment takes the first
reason out of the logits. The model is a tiny Llama with random weights: nothing is downloaded.

Needs transformers: pip install --no-build-isolation ".[transformers]"
Run: python examples/transformers_trainer.py
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from functools import partial
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import longtail
from longtail.integrations.transformers import ComputeLoss, set_loss_function
from longtail.training import LongTailAccuracy


def generate(vocabulary: int, sequences: int, length: int = 32) -> Tensor:
    """Token ids (sequences, length) of a random Markov chain over Zipf's frequencies."""
    frequency = 1 / torch.arange(1, vocabulary + 1)
    transition = frequency * torch.exp(2 * torch.randn(vocabulary, vocabulary))
    tokens = [torch.multinomial(frequency, sequences, replacement=True)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(transition[tokens[-1]], 1).flatten())
    return torch.stack(tokens, dim=1)


def next_token_scores(evaluated: EvalPrediction, counts: Tensor) -> dict[str, float]:
    """The Trainer's ``compute_metrics``: accuracy by how often a token occurs, "few" below the median."""
    predicted, labels = torch.as_tensor(evaluated.predictions), torch.as_tensor(evaluated.label_ids)
    median = counts.double().median().item()
    accuracy = LongTailAccuracy(counts, many=4 * median, few=median)
    accuracy.update(predicted[:, :-1] == labels[:, 1:], labels[:, 1:])
    scores = accuracy.compute()
    return {"all": scores.overall, "many": scores.many, "medium": scores.medium, "few": scores.few}


def make_trainer(
    train: Tensor, test: Tensor, counts: Tensor, settings: TrainingArguments, loss: ComputeLoss | None = None
) -> Trainer:
    torch.manual_seed(0)  # every loss starts from the same weights
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    trainer = Trainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(counts), **sizes)),
        settings,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in train],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in test],
        compute_loss_func=loss,
        compute_metrics=partial(next_token_scores, counts=counts),
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(dim=-1),  # raw logits, for every loss
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_and_report(name: str, trainer: Trainer) -> None:
    trainer.train()
    scores = trainer.evaluate()
    accuracies = (100 * scores[f"eval_{group}"] for group in ("all", "many", "medium", "few"))
    print(f"{name:18}{scores['eval_loss']:9.3f}" + "".join(f"{accuracy:9.1f}" for accuracy in accuracies))


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=100, help="number of tokens")
    parser.add_argument("--sequences", type=int, default=2000, help="of 32 tokens each; a tenth is held out")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the text")
    options = parser.parse_args()

    torch.manual_seed(0)
    test, train = generate(options.vocabulary, options.sequences).tensor_split([options.sequences // 10])
    counts = longtail.class_counts(train, options.vocabulary)
    adjusted = longtail.CrossEntropyLoss(class_bias=longtail.logit_adjustment(counts, empty="clamp"))
    weighted = longtail.CrossEntropyLoss(weight=longtail.effective_number_weight(counts, beta=0.999, empty="clamp"))
    print(f"{'held out':18}{'loss':>9}{'all %':>9}{'many':>9}{'medium':>9}{'few':>9}")
    with TemporaryDirectory() as folder:
        quiet = {"disable_tqdm": True, "save_strategy": "no"}
        settings = TrainingArguments(folder, num_train_epochs=options.epochs, learning_rate=5e-3, use_cpu=True, **quiet)
        new_trainer = partial(make_trainer, train, test, counts, settings)
        train_and_report("cross-entropy", new_trainer())

        # One way: the Trainer computes the loss. Evaluation is plain cross-entropy by default, but the raw logits of
        # this model know nothing of frequencies: with its bias the loss compares with that of the others.
        compute_loss = ComputeLoss(adjusted, shift_labels=True, evaluation_loss=adjusted)
        train_and_report("logit adjustment", new_trainer(compute_loss))

        # The other: the model computes it, wherever it is called with labels.
        trainer = new_trainer()
        with set_loss_function(trainer.model, weighted):
            train_and_report("class weights", trainer)


if __name__ == "__main__":
    main()
