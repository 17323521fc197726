"""The parameters of the notebooks, each declared once: type, range, default, and one sentence.

A notebook's parameters cell repeats them as literals, for people and papermill; its next cell is
`settings = ICPSettings.of(globals())`. The defaults are the laptop profile. After a change here,
`./run_all.sh python docs/parameters.py` writes the cells and docs/parameters.md anew.
"""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, WrapValidator, model_validator

from icprobe.artifact import checks
from icprobe.artifact.parameters import Parameters

if TYPE_CHECKING:
    from icprobe.scores import Experiment

Count = Annotated[int, Field(ge=1)]
FromZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
# a list keeps whole numbers as they are, since they name conditions in tables: 0, not 0.0
_AS_GIVEN = WrapValidator(lambda value, check: (check(value), value)[1])
Angle = Annotated[float, Field(ge=0, lt=90), _AS_GIVEN]
Text = Annotated[str, Field(min_length=1)]
Source = Annotated[str, AfterValidator(checks.source), AfterValidator(checks.apart)]
Model = Annotated[Text, AfterValidator(checks.model), AfterValidator(checks.apart)]
Output = Annotated[Text, AfterValidator(checks.output)]
Kept = Annotated[Text, AfterValidator(checks.kept)]
Column = Literal["id", "prompt", "completion", "task", "content", "type", "options"]
Columns = dict[Column, Annotated[str, AfterValidator(checks.template)] | None]
Suite = Annotated[str, AfterValidator(checks.suite)]
Pools = Annotated[
    dict[Suite, Annotated[list[Count], Field(min_length=2, max_length=2)]],
    Field(description="for 03: {suite: [N, M]}"),
]
Resamples = Annotated[
    int,
    Field(ge=2, description="resamples of training examples and queries behind each interval"),
]
Memory = Annotated[
    Annotated[float, Field(ge=0)] | None,
    Field(description="GiB of gradient factors to hold; None: 0.75, or half of a GPU"),
]
BudgetUnit = Annotated[
    Literal["examples", "tokens"],
    Field(description="the budget is a share of the pool's examples, or of its tokens"),
]
Engine = Annotated[
    Literal["local", "ray"],
    Field(description="local, or ray: workers of a Ray cluster, or of this machine"),
]
Fresh = Annotated[
    bool, Field(description="True reuses nothing that is finished and computes everything anew")
]

# --------------------------------------------------------------------------------------- notebooks


class Common(Parameters):
    """What every notebook has."""

    profile: Text = "laptop"
    """name of this set of parameters, written into figures"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """which examples or problems are drawn, and every resample"""
    output_dir: Output = "figures/laptop"
    """folder of figures and tables, from the repository root"""
    scores_dir: Kept = "data/scores/laptop"
    """folder of the scores that are made here; not used by 07"""


class Scored(Common):
    """A model, a training pool and queries, as six notebooks have them."""

    model: Model = "smollm2-135m-instruct"
    """the built-in one, a folder or a hub name (name@revision)"""
    train: Source = "grid"
    """training pool: a suite, a .jsonl or .parquet file, or a hub name"""
    train_split: Text = "train"
    """split of the pool: of suites, and of hub data sets with several"""
    train_columns: Columns | None = None
    """own data: {"prompt": "question"}, or templates: "{question}\""""
    queries: Source = "grid"
    """what the model should become better at; the same kinds of source"""
    query_split: Text = "query"
    """split of the queries, like train_split"""
    query_columns: Columns | None = None
    """columns of the queries, like train_columns"""
    n_train: Count | None = 132
    """N, training examples; None takes all"""
    n_query: Count | None = 48
    """M, queries; None takes all"""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "float32"
    """float32, bfloat16, float16, float64; auto: bfloat16 where it is native"""
    max_length: Count | None = 512
    """most tokens of an example; longer prompts lose their beginning"""
    preamble: str = ""
    """text before the demonstration; the paper's is in profiles/paper.yaml"""

    def experiment(self) -> "Experiment":
        """Return what is scored."""
        from icprobe.scores import Experiment

        names = Experiment.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return Experiment(**{name: getattr(self, name) for name in names})


class ICPSettings(Scored):
    """Of 01_icp_scoring."""

    condition_pools: Pools = {"crossed": [160, 48], "sentiment": [96, 32]}
    engine: Engine = "local"
    fresh: Fresh = False


class Gradients(Scored):
    """Which gradients count."""

    layers: Annotated[str, AfterValidator(checks.regular_expression)] = ""
    """linear layers whose names contain this regular expression; "" for all"""
    loss_on: Literal["completion", "text"] = "completion"
    """training loss on completion or text (with the prompt; as published)"""


class TrainingEffect(Gradients):
    """Real training steps, the ground truth."""

    n_trained: Count | None = 96
    """training examples really trained on, a step each; None: all"""
    m_trained: Count | None = 24
    """queries measured after each of these steps; None: all"""
    steps: Annotated[list[list], AfterValidator(checks.steps)] = [
        ["sgd", 1e-4], ["sgd", 3e-3], ["adamw", 1e-5]
    ]  # fmt: skip
    """[sgd or adamw, rate]"""


class Estimators(TrainingEffect):
    """What stands beside gradient products."""

    ekfac_blocks: Count = 2
    """EK-FAC is taken over so many of the last transformer blocks"""
    n_compared: Count | None = 36
    """training examples for slow estimators (clamp and log); None: all"""
    m_compared: Count | None = 12
    """queries for slow estimators; None: all"""
    tracin_epochs: Count = 1
    """TracIn: passes of fine-tuning over the pool"""
    tracin_checkpoints: Count = 2
    """TracIn: checkpoints of this training that count, beside the start"""
    condition_pools: Pools = {"crossed": [160, 48], "sentiment": [96, 32]}


class InfluenceSettings(Estimators):
    """Of 02_influence."""

    memory: Memory = None
    engine: Engine = "local"
    fresh: Fresh = False


class CorrelationSettings(Estimators):
    """Of 03_correlation."""

    resamples: Resamples = 400


class FinetuningSettings(Gradients):
    """Of 04_finetuning."""

    evaluation: Source | None = None
    """held-out queries; None: a suite's own split, or half the queries"""
    evaluation_split: Text = "evaluation"
    """split of the held-out queries, like train_split"""
    evaluation_columns: Columns | None = None
    """columns of the held-out queries, like train_columns"""
    n_evaluation: Count | None = 48
    """Q, held-out queries; None takes all"""
    n_answered: FromZero | None = 12
    """open held-out queries that models answer in words; None: all"""
    answer_tokens: Count = 24
    """most tokens of such an answer"""
    rivals: Annotated[list[str], AfterValidator(checks.baselines)] = []
    """what else chooses data: titles of baselines, "hidden states", ..."""
    budget: Fraction = 0.12
    """share of the pool that a method may choose"""
    budget_unit: BudgetUnit = "examples"
    budgets: list[Annotated[Fraction, _AS_GIVEN]] = [0.06]
    """other shares, for the sweep over sizes; [] for none"""
    seeds: Count = 3
    """trainings of each selection, of other order, ties and random choices"""
    sweep_seeds: Count = 1
    """trainings of each selection of the other sizes"""
    epochs: Count = 1
    """passes over the chosen examples"""
    batch_size: Count = 4
    """examples in one step"""
    rate: Positive = 0.002
    """learning rate at its highest; take 0.0001 with lora_rank 0"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """of the learning rate: linear, cosine or constant"""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the steps in which the rate rises"""
    lora_rank: FromZero = 16
    """rank of the adapters that are trained; 0 trains all weights"""
    margin: Positive = 0.1
    """of equivalence, as a share of what the full pool brings; fix it first"""
    subsets: Annotated[FromZero, AfterValidator(checks.ranked)] = 0
    """S, random subsets to train on, for the LDS (such as 32); 0 for none"""
    subset_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """share of the pool in each of them"""
    subset_seeds: Count = 2
    """trainings on each of them"""
    judge_url: Annotated[str, Field(pattern="^(https?://.+)?$")] = ""
    """OpenAI-compatible endpoint that compares answers; "" for no judge"""
    judge_model: str = ""
    """the model to ask there; its key is in the variable ICPROBE_JUDGE_KEY"""
    resamples: Resamples = 1000
    fresh: Fresh = False


class RegressionSettings(Common):
    """Of 05_synthetic_regression."""

    networks_dir: Kept = "data/scores/laptop/networks"
    """folder of networks that are trained here"""
    dimension: Annotated[int, Field(ge=4)] = 5
    """D, of tasks and covariates; planes at an angle need four"""
    noise: Positive = 0.5
    """standard deviation of labels"""
    network_pairs: Annotated[int, Field(ge=2)] = 11
    """K, most pairs (x, y) of a sequence, the query included"""
    network_width: Count = 48
    """width of the transformer, a multiple of network_heads"""
    network_layers: Count = 4
    """its blocks"""
    network_heads: Count = 4
    """heads of attention in each block"""
    network_steps: Count = 3300
    """steps of its training, each on 64 new sequences"""
    network_rate: Positive = 0.002
    """learning rate at its highest"""
    network_seeds: Count = 3
    """networks trained alike, behind agreements in domain and under shifts"""
    prior_mean: float = 1.0
    """informative prior: mean of each coordinate of a task"""
    prior_spread: Positive = 0.5
    """informative prior: standard deviation of each coordinate"""
    n_tasks: Annotated[int, Field(ge=2)] = 20
    """B, tasks (problems) behind each number"""
    n_examples: Count = 200
    """N, training examples of each task"""
    n_queries: Count = 100
    """M, queries of each task"""
    bases: list[Annotated[list[FromZero], Field(min_length=2, max_length=2)]] = Field(
        [[0, 1], [2, 1], [2, 8], [4, 8]], min_length=1
    )
    """[pairs before an example, contexts]"""
    cosines: list[Annotated[float, Field(ge=-1, le=1), _AS_GIVEN]] = Field(
        [1, 0.9, 0.7, 0.5, 0.25, 0, -0.25, -0.5, -0.75, -1], min_length=1
    )
    """of tasks, -1 to 1"""
    scales: list[Annotated[Positive, _AS_GIVEN]] = Field([1, 0.25, 0.5, 2, 3], min_length=1)
    """of examples' covariates; the first is the reference"""
    offsets: list[Annotated[float, _AS_GIVEN]] = Field([0, 1, 2, 3, 4], min_length=1)
    """of mean covariates from 0; queries lie on the other side"""
    angles: list[Angle] = Field([0, 30, 60, 75, 85], min_length=1)
    """degrees between planes of examples and queries"""
    quick_width: Annotated[int, Field(gt=0, multiple_of=2)] = 32
    """width of smaller networks whose training is watched, an even number"""
    quick_steps: Count = 1000
    """steps of their training"""
    watched: list[FromZero] = Field([0, 50, 100, 150, 200, 300, 500, 750, 1000], min_length=1)
    """steps after which to look"""
    rates: list[Annotated[Positive, _AS_GIVEN]] = Field(
        [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0], min_length=1
    )
    """of the exact step"""
    cost_dimensions: list[Count] = Field([5, 10, 20], min_length=1)
    """values of D in the table of cost"""
    fresh: Fresh = False

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        # the library would say so, too, but after the networks are trained
        longest = self.network_pairs - 2  # the example and the query
        if not all(pairs <= longest and contexts for pairs, contexts in self.bases):
            raise ValueError(
                f"bases is {self.bases}: expected [up to network_pairs - 2, {longest}; from 1]"
            )
        if self.network_width % self.network_heads:
            raise ValueError(
                f"network_heads is {self.network_heads}: expected a divisor of network_width, "
                f"{self.network_width}"
            )
        if max(self.watched) > self.quick_steps:
            raise ValueError(f"watched is {self.watched}: expected up to quick_steps")
        return self


class CostSettings(TrainingEffect):
    """Of 06_cost."""

    compared: Annotated[Text, AfterValidator(checks.file)] | None = (
        "figures/reference/laptop/cost.csv"
    )
    """timings beside other libraries"""
    methods: Annotated[list[str], AfterValidator(checks.timed_methods)] | None = None
    """what to time here, by the benchmark's names; None: ours"""
    n_timed: Count = 8
    """training examples that are timed here"""
    m_timed: list[Count] = Field([1, 12], min_length=1)
    """numbers of queries that are timed here"""
    timing_repeats: Count = 1
    """runs of each timing, methods taking turns"""
    resamples: Resamples = 400


class PublishedSettings(Common):
    """Of 07_published_scores."""

    published_dir: Annotated[str, AfterValidator(checks.folder), AfterValidator(checks.apart)] = ""
    """a copy of the authors' repository; "" fetches their files"""
    resamples: Resamples = 1000


class YourDataSettings(Scored):
    """Of 08_your_data."""

    output_dir: Output = "figures/your_data"
    """folder of figures and tables, from the repository root"""
    scores_dir: Kept = "data/scores/your_data"
    """folder of finished scores, which are reused"""
    train: Source = "data/demo.jsonl"
    """training pool: a suite, .jsonl or .parquet file, or hub name"""
    queries: Source = "data/demo_queries.jsonl"
    """what the model should become better at; like train"""
    n_train: Count | None = None
    """N, training examples; None takes all"""
    n_query: Count | None = None
    """M, queries; None takes all"""
    n_sample: Annotated[int, Field(ge=4)] = 32
    """training examples of the sample (or all), a real training step on each"""
    m_sample: Count = 24
    """queries of the sample (or all)"""
    step: Annotated[list, Field(min_length=2, max_length=3), AfterValidator(checks.step)] = [
        "adamw", 1e-5
    ]  # fmt: skip
    """the training step: sgd or adamw, and its learning rate"""
    tolerance: Positive = 0.1
    """differences of Spearman correlations that do not matter"""
    method: Literal["ICP", "gradients", "similarity"] | None = None
    """ICP, gradients or similarity scores the pool; None: as the rule says"""
    budget: Fraction = 0.2
    """share of the pool that is selected"""
    budget_unit: BudgetUnit = "examples"
    choice: Literal["in turn", "top"] = "in turn"
    """in turn: each query its best; top: the highest mean over queries"""
    near: Fraction = 0.6
    """fraction of a query's three-word runs that makes an example a near copy"""
    keep_copies: bool = False
    """True: copies of queries may be in the sample and be selected"""
    memory: Memory = None
    resamples: Resamples = 400
    engine: Engine = "local"
    fresh: Fresh = False


NOTEBOOKS: dict[str, type[Parameters]] = {
    "01_icp_scoring": ICPSettings,
    "02_influence": InfluenceSettings,
    "03_correlation": CorrelationSettings,
    "04_finetuning": FinetuningSettings,
    "05_synthetic_regression": RegressionSettings,
    "06_cost": CostSettings,
    "07_published_scores": PublishedSettings,
    "08_your_data": YourDataSettings,
}


def used_in(source: str) -> type[Parameters] | None:
    """Return the settings that a notebook's source uses, the same in a copy; or None."""
    return next((one for one in NOTEBOOKS.values() if f"{one.__name__}.of(" in source), None)
