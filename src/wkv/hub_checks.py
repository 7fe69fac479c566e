"""What must not leave the machine: secrets, states of optimizers, its own paths, weights that are not finite."""

import json
import os
import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from .checks import refuse_nonfinite
from .tensor_files import open_checkpoint

# Longer files are data; tokenizer.json, the longest text of a model that holds none, stays below.
SEARCHED_BYTES = 64_000_000
# What programs leave behind, for nobody else to see.
LITTER = (".git", ".gitignore", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store", ".venv", ".vscode", ".idea")
LITTER += ("wandb", "mlruns", "runs", ".pytest_cache", ".ruff_cache", "node_modules")
# Names, in small letters.
SECRET_NAMES = (".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".npmrc", ".pypirc")
SECRET_NAMES += ("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.p12", "*.pfx", "*.key", "*.ppk")
SECRET_NAMES += ("credentials", "credentials.json", "secrets.*", "kaggle.json", "token", "stored_tokens", ".htpasswd")
SECRET_NAMES += (".*_history",)
SECRET_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube"}
SECRETS = {
    "a Hugging Face token": rb"(?:hf|api_org)_(?!(\w)\1{9})[A-Za-z0-9]{30,}",
    "an AWS access key": rb"(?:AKIA|ASIA)[0-9A-Z]{16}",
    "an AWS secret key": rb"(?i)aws_secret(?:_access)?_key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{30,}",
    "an Azure key": rb"AccountKey=[A-Za-z0-9/+]{40,}",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "a GitHub token": rb"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{36,})",
    "a password in an address": rb"://[^\s/:@\"'<>{}$]{1,64}:[^\s/:@\"'<>{}$]{1,256}@\w",
    "a signed token": rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "an API key": rb"(?<![A-Za-z0-9])sk-(?=[\w-]*\d)(?:[A-Za-z]+-)*[A-Za-z0-9][\w-]{31,}|xox[abprs]-[0-9A-Za-z-]{20,}"
    rb"|glpat-[\w-]{20,}|AIza[\w-]{35}|pypi-AgE[\w-]{20,}|npm_[A-Za-z0-9]{36}|[sr]k_live_[A-Za-z0-9]{20,}"
    rb"|dckr_pat_[\w-]{20,}",
    "a key": rb"(?i)(?:WANDB|OPENAI|ANTHROPIC|HF)_?(?:API_?)?(?:KEY|TOKEN)[\"']?\s*[=:]\s*[\"']?(?=[\w-]*\d)[\w-]{20,}",
}
# By name in a folder that was trained in.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer.pth", "optimizer.safetensors", "optimizer_[0-9]*")
OPTIMIZERS += ("scheduler.pt", "scaler.pt", "rng_state*", "*_optim_states.pt", "*_model_states.pt", "zero_pp_rank*")
OPTIMIZERS += ("zero_to_fp32.py", "pytorch_model_fsdp*", "*.distcp", ".metadata", "events.out.tfevents.*")
TRAINING_FOLDERS = re.compile(r"(?:^|/)(?:checkpoint-\d+|global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+)/")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5", ".npz", ".npy", ".dill")
PACKED = re.compile(r"\.(?:gz|bz2|xz|zst|zip)$")
# Vocabularies hold every path.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "rwkv_vocab*.txt", "20B_tokenizer.json")
HOMES = "home|Users|root|mnt|scratch|workspace|Volumes|gpfs|lustre|nfs|fsx|content/drive|kaggle/working"
# A link in Markdown may begin with these too.
ROOTS = "media|opt|srv|var|data|work|private|projects"
LOCAL_PATH = re.compile(
    # After an option of compilers, but neither within a path or an address nor below a variable.
    rf"(?:(?:(?<![\w./~%@}}-])|(?<=-[ILl]))(?:file:/*)?(?:/(?:{HOMES})|(?<!\]\()(?<!href=\")(?<!src=\")/(?:{ROOTS}))"
    r"/[\w.+-]+"
    # C:\Users, as it is or escaped; `Q:\nWhat` and `A:` are questions and answers, and \n before a capital ends a line.
    r"|(?<!\w)[B-PR-Zc-f]:\\{1,2}(?!n[A-Z\\])[A-Za-z]\w+|(?<!\w)[A-Za-z]:/\w[\w.-]*/\w+"
    r"|(?<![^\s\"'=(])(?:\\\\[A-Za-z][\w.-]+\\|\\{4}[A-Za-z][\w.-]+\\\\)[A-Za-z]\w+)"
)


def refuse_names(folder: Path, path: str, allow_pickles: bool) -> None:
    """Raise ValueError for a file that by its name is a secret, part of a training run, or a pickle."""
    name, where = Path(path).name.lower(), folder / path
    if _is_like(name, SECRET_NAMES) or SECRET_FOLDERS & set(Path(path).parts):
        raise ValueError(f"{where}: such a file holds secrets; remove it")
    if _is_like(name, OPTIMIZERS) or TRAINING_FOLDERS.search(path):
        raise ValueError(f"{where}: belongs to a training run (optimizer, checkpoint, logs); remove or --exclude it")
    if name == "training_args.bin":
        raise ValueError(f"{where}: a pickle with the settings and paths of this machine; remove or --exclude it")
    if PACKED.sub("", name).endswith(PICKLES) and not allow_pickles:
        raise ValueError(
            f"{where}: a pickle, which can run code where it is loaded; save as safetensors, or give --allow-pickles"
        )


def litter_of(path: str) -> str | None:
    """The file or folder of a path that programs left behind, if it lies in such a one."""
    parts = Path(path).parts
    return next(("/".join(parts[: n + 1]) for n, part in enumerate(parts) if part in LITTER), None)


def refuse_link(folder: Path, path: Path, allow_pickles: bool) -> None:
    """Raise ValueError for a link that leads out of the folder, to a folder, or to what may not go up itself."""
    target, root = path.resolve(), folder.resolve()
    if not target.exists() or not target.is_relative_to(root):
        raise ValueError(f"{path}: a link out of the folder, to {os.readlink(path)}; copy what is meant")
    name = target.relative_to(root).as_posix()
    if target.is_dir() or litter_of(name):
        raise ValueError(f"{path}: a link to {name}, which does not go up so; remove it, or copy what is meant")
    refuse_names(folder, name, allow_pickles)


def refuse_text(where: Path, data: bytes) -> None:
    """Raise ValueError for secrets in a file, and for paths of this machine in a text; the line is named."""
    # UTF-16 is found as ASCII.
    is_binary = b"\0" in data[:8192] and not data.startswith((b"\xff\xfe", b"\xfe\xff"))
    data = data.replace(b"\0", b"")
    for what, pattern in SECRETS.items():
        if found := re.search(pattern, data):
            raise ValueError(f"{where}: line {_line(data, found.start())} holds {what}; remove it, and revoke it")
    if is_binary or _is_like(where.name, VOCABULARIES):
        return
    text = data.decode("utf-8", errors="replace")
    if local := _local_path(where, text):
        line = _line(text, max(text.find(local), text.find(json.dumps(local)[1:-1])))
        raise ValueError(f"{where}: line {line} holds a path of this machine, {local}; remove it")


def refuse_weights(path: Path) -> None:
    """Raise ValueError for weights that are damaged, hold NaN or infinity, or tell secrets or paths in their header."""
    checkpoint = open_checkpoint(path)
    header = json.dumps([checkpoint.metadata, list(checkpoint.tensors)], indent=0)
    refuse_text(path.with_name(f"{path.name} (its header).json"), header.encode())
    refuse_nonfinite(path, checkpoint.tensors)


def is_local(name: str) -> bool:
    """Whether the name of a base model is that of a folder here and not of a repository."""
    return (
        os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or Path(name).is_dir()
    )


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _line(text: bytes | str, place: int) -> int:
    return text.count(b"\n" if isinstance(text, bytes) else "\n", 0, place) + 1


def _local_path(where: Path, text: str) -> str | None:
    """A path of this machine in a text: below a root that machines have, or the folders of this user and process."""
    texts, is_json = [text], False
    if where.suffix.lower() in (".json", ".ipynb"):
        with suppress(json.JSONDecodeError):
            texts, is_json = list(_strings(json.loads(text))), True
    # Shorter ones, such as / and /app, are words of many texts.
    own = sorted(str(path) for path in (Path.home(), Path.cwd(), where.parent.resolve()) if len(path.parts) > 2)
    for part in texts:
        if found := LOCAL_PATH.search(part):
            return found[0]
        if inside := [path for path in own if path in part]:
            return inside[0]
        if is_json and os.path.isabs(part) and part.count("/") > 1 and not re.search(r"\s", part):
            return part
    return None


def _strings(content):
    """All strings in a JSON file's content, keys among them."""
    if isinstance(content, dict):
        content = [*content.keys(), *content.values()]
    elif isinstance(content, str):
        yield content
    if isinstance(content, list):
        for item in content:
            yield from _strings(item)
