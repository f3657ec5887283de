"""No module reads a format that can run code, and none runs code that it is not asked for."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dpo_dist"
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "dbm",
    "code",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load": "weights are read from safetensors",
    "torch.jit.load": "weights are read from safetensors",
    "torch.package.PackageImporter": "code in a file",
    "np.load": "arrays are read by np.memmap or safetensors",
    "numpy.load": "arrays are read by np.memmap or safetensors",
    "yaml.load": "yaml.safe_load",
    "yaml.unsafe_load": "yaml.safe_load",
    "yaml.full_load": "yaml.safe_load",
    "os.system": "subprocess without a shell",
    "os.popen": "subprocess without a shell",
    "importlib.import_module": "no module by its name",
    "hydra.utils.instantiate": "no _target_",
    "hydra.utils.get_method": "no _target_",
    "runpy.run_path": "no code by its path",
    "runpy.run_module": "no code by its name",
    "pd.read_pickle": "no pickle",
}
# The one door to code of the user, named on the command line, and Jinja's parser without rendering.
ALLOWED = {("config/user_code.py", name) for name in ("exec", "compile", "importlib.import_module")}
LOADERS = {"AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str, name: str) -> Iterator[str]:
    """The places of a module that can run code from data."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = {alias.name.partition(".")[0] for alias in names} & MODULES
            case ast.ImportFrom(module=str(module)):
                found = {module.partition(".")[0]} & MODULES
                found |= {f"{module}.{alias.name}" for alias in node.names} & CALLS.keys()
            case ast.Call(func=function):
                found = set(unsafe_call(dotted(function), node))
            case ast.Constant(value="_target_"):
                found = {"_target_"}
            case _:
                continue
        yield from (f"{name}:{node.lineno} {what}" for what in found if (name, what) not in ALLOWED)


def unsafe_call(called: str, node: ast.Call) -> Iterator[str]:
    given = {word.arg: word.value for word in node.keywords}
    if called in BUILTINS or called in CALLS:
        yield called
    for option in ("shell", "allow_pickle"):
        if option in given and not (isinstance(given[option], ast.Constant) and not given[option].value):
            yield option
    kind, _, method = called.rpartition(".")
    if method == "from_pretrained" and kind in LOADERS and "use_safetensors" not in given:
        yield f"{called} without use_safetensors"
    trusts = given.get("trust_remote_code")
    if isinstance(trusts, ast.Constant) and trusts.value:
        yield "trust_remote_code"


def test_no_module_can_run_code_from_data() -> None:
    found = [
        fault
        for file in sorted(PACKAGE.rglob("*.py"))
        for fault in faults(file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix())
    ]
    assert found == []


def test_the_scan_sees() -> None:
    sources = """
        import pickle
        from pickle import loads
        torch.load('a', weights_only=True)
        eval('1')
        yaml.load('a', yaml.Loader)
        subprocess.run('a', shell=True)
        from hydra.utils import instantiate
        AutoModelForCausalLM.from_pretrained('a')
        AutoTokenizer.from_pretrained('a', trust_remote_code=True)
        a = {'_target_': 'b'}
    """
    for source in sources.split("\n")[1:-1]:
        assert list(faults(source.strip(), "a.py")), source
