//! A reader for the part of Python's pickle format that PyTorch state dictionaries use (`pickletools` in the Python sources is the reference).
//!
//! A pickle is a program. This reader runs none of it that could do anything: the only callables it knows are the ones that stand for a tensor, a storage
//! type or an ordered dictionary, and those it *recognises*, it does not call. Everything else is refused by name. It knows bytes only: no files, and of
//! tensors only where their numbers lie.
//!
//! Bounded by construction: one pass over the input, one node at most for an opcode, no recursion (objects live in an arena and refer to each other by
//! index), no length taken from the input is ever used to allocate.

use std::collections::HashMap;

/// Nested state dictionaries are shallow; longer pickles than this are no weight files. EfficientNet-B4's is 0.1 MB.
pub const MAX_PICKLE_BYTES: usize = 32 << 20;
/// PyTorch tensors of weight files have up to 5 dimensions.
const MAX_DIMS: usize = 8;
/// Storage keys are decimal numbers; they are copied into every tensor, so a long one could multiply.
const MAX_KEY_BYTES: usize = 64;

/// Why a pickle is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PickleError {
    /// The input ends inside an opcode.
    #[error("is cut off (byte {at})")]
    CutOff {
        /// Offset, in bytes from the start of the pickle.
        at: usize,
    },
    /// An opcode that no state dictionary needs.
    #[error("uses pickle opcode {opcode:#04x} at byte {at}, which no plain state dictionary needs")]
    Opcode {
        /// Opcode.
        opcode: u8,
        /// Offset.
        at: usize,
    },
    /// A class or function that is not one of the few that stand for tensors.
    #[error(
        "wants Python to load {name}: only tensors are read from it; in Python, save `model.state_dict()` alone, or use a .safetensors file"
    )]
    Forbidden {
        /// `module.name`.
        name: String,
    },
    /// The program makes no sense.
    #[error("is damaged: {why} (byte {at})")]
    Damaged {
        /// Cause.
        why: &'static str,
        /// Offset.
        at: usize,
    },
    /// Too long.
    #[error("holds a pickle of {0} bytes, more than the {MAX_PICKLE_BYTES} allowed: it is no plain state dictionary")]
    TooLong(usize),
}

/// Number formats of PyTorch storages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// Upper half of a binary32.
    BF16,
    /// Signed 64 bit.
    I64,
    /// Signed 32 bit.
    I32,
    /// Signed 16 bit.
    I16,
    /// Signed 8 bit.
    I8,
    /// Unsigned 8 bit.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl Dtype {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    fn of_storage(class: &str) -> Option<Self> {
        Some(match class {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::BF16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "CharStorage" => Self::I8,
            "ByteStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }
}

/// Where a tensor's numbers lie: `strides` and `offset` count elements in the storage named `storage`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRef {
    /// Number format.
    pub dtype: Dtype,
    /// Key of the storage.
    pub storage: String,
    /// Elements that the storage holds, as the pickle says.
    pub storage_len: usize,
    /// First element.
    pub offset: usize,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, per dimension.
    pub strides: Vec<usize>,
}

/// Index into the arena.
type Id = usize;

/// The callables that may be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

#[derive(Clone, Debug)]
enum Node {
    Mark,
    None,
    Bool,
    Int(i64),
    /// A number that no tensor needs (float, long integer).
    Number,
    Text(String),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        dtype: Dtype,
        key: String,
        len: usize,
    },
    Tensor(Box<TensorRef>),
}

/// A pickle that was read.
#[derive(Debug)]
pub struct Pickle {
    arena: Vec<Node>,
    root: Id,
    /// Bytes read; what follows belongs to somebody else.
    pub length: usize,
}

impl Pickle {
    /// Read the pickle at the start of `bytes`.
    ///
    /// # Errors
    /// When it is damaged, too long, or wants anything that is no tensor.
    pub fn read(bytes: &[u8]) -> Result<Self, PickleError> {
        let mut reader = Reader { bytes, at: 0, arena: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        let root = reader.run()?;
        Ok(Self { arena: reader.arena, root, length: reader.at })
    }

    /// The tensors of a state dictionary by name. A dictionary that holds the state dictionary under `state_dict`, `model` or `model_state_dict` (training
    /// checkpoints) is opened; entries that are no tensors are left out.
    pub fn tensors(&self) -> Vec<(&str, &TensorRef)> {
        let mut root = self.root;
        if let Some(inner) = ["state_dict", "model_state_dict", "model"].iter().find_map(|key| self.entry(root, key)) {
            root = inner;
        }
        let Some(Node::Dict(pairs)) = self.arena.get(root) else { return Vec::new() };
        pairs
            .iter()
            .filter_map(|(key, value)| match (self.arena.get(*key)?, self.arena.get(*value)?) {
                (Node::Text(name), Node::Tensor(tensor)) => Some((name.as_str(), &**tensor)),
                _ => None,
            })
            .collect()
    }

    /// Keys and number formats of all storages that the pickle speaks of, in tensors of the state dictionary or elsewhere (an optimiser's, say).
    pub fn storages(&self) -> impl Iterator<Item = (&str, Dtype)> {
        self.arena.iter().filter_map(|node| if let Node::Storage { dtype, key, .. } = node { Some((key.as_str(), *dtype)) } else { None })
    }

    /// The texts of a list, for the list of storage keys in old files; `None` when it is anything else.
    pub fn texts(&self) -> Option<Vec<&str>> {
        let Node::List(items) = self.arena.get(self.root)? else { return None };
        items.iter().map(|id| if let Some(Node::Text(text)) = self.arena.get(*id) { Some(text.as_str()) } else { None }).collect()
    }

    /// The integer, for the protocol number in old files.
    pub fn integer(&self) -> Option<i64> {
        if let Some(Node::Int(value)) = self.arena.get(self.root) { Some(*value) } else { None }
    }

    /// A dictionary under `key` of the dictionary `at`.
    fn entry(&self, at: Id, key: &str) -> Option<Id> {
        let Some(Node::Dict(pairs)) = self.arena.get(at) else { return None };
        let (_, value) = pairs.iter().find(|(k, _)| matches!(self.arena.get(*k), Some(Node::Text(text)) if text == key))?;
        matches!(self.arena.get(*value), Some(Node::Dict(_))).then_some(*value)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    arena: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at which marks lie.
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

impl<'a> Reader<'a> {
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            if self.at > MAX_PICKLE_BYTES {
                return Err(PickleError::TooLong(self.bytes.len()));
            }
            let opcode = self.byte()?;
            match opcode {
                0x80 => {
                    // PROTO
                    if self.byte()? > 5 {
                        return self.damaged("it has a newer pickle protocol than 5");
                    }
                }
                // FRAME: a hint for readers that fetch ahead.
                0x95 => {
                    self.take(8)?;
                }
                b'.' => return self.pop(), // STOP
                b'(' => {
                    let mark = self.new_node(Node::Mark);
                    self.marks.push(self.stack.len());
                    self.stack.push(mark);
                }
                b'N' => self.push(Node::None),
                0x88 | 0x89 => self.push(Node::Bool),
                b'K' => {
                    let value = self.byte()?;
                    self.push(Node::Int(value.into()));
                }
                b'M' => {
                    let [a, b] = self.array()?;
                    self.push(Node::Int(u16::from_le_bytes([a, b]).into()));
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Node::Int(value.into()));
                }
                0x8a => {
                    // LONG1: little-endian two's complement of any length.
                    let length = self.byte()?.into();
                    let data = self.take(length)?;
                    let node = if data.len() <= 8 {
                        let fill = if data.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
                        let mut wide = [fill; 8];
                        for (w, b) in wide.iter_mut().zip(data) {
                            *w = *b;
                        }
                        Node::Int(i64::from_le_bytes(wide))
                    } else {
                        Node::Number
                    };
                    self.push(node);
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Node::Number);
                }
                b'X' | b'T' => {
                    // BINUNICODE, BINSTRING
                    let length = u32::from_le_bytes(self.array()?) as usize;
                    self.text(length)?;
                }
                0x8c | b'U' => {
                    // SHORT_BINUNICODE, SHORT_BINSTRING
                    let length = self.byte()?.into();
                    self.text(length)?;
                }
                b'C' => {
                    let length = self.byte()?.into();
                    self.take(length)?;
                    self.push(Node::Bytes);
                }
                b'B' => {
                    let length = u32::from_le_bytes(self.array()?) as usize;
                    self.take(length)?;
                    self.push(Node::Bytes);
                }
                b'}' => self.push(Node::Dict(Vec::new())),
                b']' => self.push(Node::List(Vec::new())),
                b')' => self.push(Node::Tuple(Vec::new())),
                0x85..=0x87 => {
                    let n = usize::from(opcode - 0x84);
                    let from = self.stack.len().checked_sub(n).filter(|from| *from >= self.floor());
                    let Some(from) = from else { return self.damaged("a tuple is longer than the stack") };
                    let items = self.stack.split_off(from);
                    self.push(Node::Tuple(items));
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Tuple(items));
                }
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::List(items));
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    let pairs = self.pairs(&items)?;
                    self.push(Node::Dict(pairs));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(&[(key, value)])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    let pairs = self.pairs(&items)?;
                    self.set(&pairs)?;
                }
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    let global = global(module, name)?;
                    self.push(Node::Global(global));
                }
                0x93 => {
                    // STACK_GLOBAL
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Some(Node::Text(module)), Some(Node::Text(name))) = (self.arena.get(module), self.arena.get(name)) else {
                        return self.damaged("a class is not named by two texts");
                    };
                    let global = global(module, name)?;
                    self.push(Node::Global(global));
                }
                b'R' => {
                    let arguments = self.pop()?;
                    let callable = self.pop()?;
                    let node = self.reduce(callable, arguments)?;
                    self.push(node);
                }
                b'Q' => {
                    let id = self.pop()?;
                    let node = self.storage(id)?;
                    self.push(node);
                }
                b'b' => {
                    // BUILD sets attributes; a state dictionary's `_metadata` is the only one that files have, and nothing here needs it.
                    self.pop()?;
                    if !matches!(self.top()?, Node::Dict(_)) {
                        return self.damaged("attributes are set on something other than a dictionary");
                    }
                }
                b'q' => {
                    let key = self.byte()?.into();
                    self.remember(key)?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.array()?) as usize;
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len())?,
                b'h' => {
                    let key = self.byte()?.into();
                    self.recall(key)?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.array()?) as usize;
                    self.recall(key)?;
                }
                b'0' => {
                    self.pop()?;
                }
                opcode => return Err(PickleError::Opcode { opcode, at: self.at - 1 }),
            }
        }
    }

    fn damaged<T>(&self, why: &'static str) -> Result<T, PickleError> {
        Err(PickleError::Damaged { why, at: self.at })
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PickleError> {
        let end = self.at.checked_add(length);
        let Some(part) = end.and_then(|end| self.bytes.get(self.at..end)) else { return Err(PickleError::CutOff { at: self.at }) };
        self.at += length;
        Ok(part)
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let at = self.at;
        self.take(N)?.try_into().map_err(|_| PickleError::CutOff { at })
    }

    fn line(&mut self) -> Result<&'a str, PickleError> {
        let rest = self.bytes.get(self.at..).unwrap_or(&[]);
        let Some(length) = rest.iter().position(|b| *b == b'\n') else { return Err(PickleError::CutOff { at: self.at }) };
        let line = self.take(length)?;
        self.take(1)?;
        match std::str::from_utf8(line) {
            Ok(line) => Ok(line),
            Err(_) => self.damaged("a class name is no text"),
        }
    }

    fn text(&mut self, length: usize) -> Result<(), PickleError> {
        let data = self.take(length)?;
        match std::str::from_utf8(data) {
            Ok(text) => self.push(Node::Text(text.to_owned())),
            Err(_) => return self.damaged("a text is not UTF-8"),
        }
        Ok(())
    }

    fn new_node(&mut self, node: Node) -> Id {
        self.arena.push(node);
        self.arena.len() - 1
    }

    fn push(&mut self, node: Node) {
        let id = self.new_node(node);
        self.stack.push(id);
    }

    /// The part of the stack that may be popped: what lies above the last mark.
    fn floor(&self) -> usize {
        self.marks.last().map_or(0, |mark| mark + 1)
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        if self.stack.len() <= self.floor() {
            return self.damaged("the stack is empty");
        }
        self.stack.pop().map_or_else(|| self.damaged("the stack is empty"), Ok)
    }

    fn top(&self) -> Result<&Node, PickleError> {
        if self.stack.len() <= self.floor() {
            return self.damaged("the stack is empty");
        }
        self.stack.last().and_then(|id| self.arena.get(*id)).map_or_else(|| self.damaged("the stack is empty"), Ok)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let Some(mark) = self.marks.pop() else { return self.damaged("a mark is missing") };
        if mark >= self.stack.len() {
            return self.damaged("a mark is missing");
        }
        let mut items = self.stack.split_off(mark);
        // The mark itself.
        items.remove(0);
        Ok(items)
    }

    fn pairs(&self, items: &[Id]) -> Result<Vec<(Id, Id)>, PickleError> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return self.damaged("a dictionary has a key without a value");
        }
        Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
    }

    fn append(&mut self, items: &[Id]) -> Result<(), PickleError> {
        self.top()?;
        match self.stack.last().and_then(|id| self.arena.get_mut(*id)) {
            Some(Node::List(list)) => list.extend_from_slice(items),
            _ => return self.damaged("something is appended to what is no list"),
        }
        Ok(())
    }

    fn set(&mut self, pairs: &[(Id, Id)]) -> Result<(), PickleError> {
        self.top()?;
        match self.stack.last().and_then(|id| self.arena.get_mut(*id)) {
            Some(Node::Dict(dict)) => dict.extend_from_slice(pairs),
            _ => return self.damaged("an entry is set in what is no dictionary"),
        }
        Ok(())
    }

    fn remember(&mut self, key: usize) -> Result<(), PickleError> {
        self.top()?;
        if let Some(id) = self.stack.last() {
            self.memo.insert(key, *id);
        }
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Result<(), PickleError> {
        let Some(id) = self.memo.get(&key).copied() else { return self.damaged("an object is used before it is made") };
        self.stack.push(id);
        Ok(())
    }

    /// What a whitelisted callable stands for.
    fn reduce(&mut self, callable: Id, arguments: Id) -> Result<Node, PickleError> {
        let (Some(Node::Global(global)), Some(Node::Tuple(arguments))) = (self.arena.get(callable), self.arena.get(arguments)) else {
            return self.damaged("something is called that is no function");
        };
        if let (Global::OrderedDict, Some(list)) = (global, arguments.first().copied()) {
            return self.dict_of_list(list);
        }
        let argument = |i: usize| arguments.get(i).and_then(|id| self.arena.get(*id));
        match global {
            Global::OrderedDict => Ok(Node::Dict(Vec::new())),
            // (tensor, requires_grad, hooks)
            Global::RebuildParameter => match argument(0) {
                Some(Node::Tensor(tensor)) => Ok(Node::Tensor(tensor.clone())),
                _ => self.damaged("a parameter holds no tensor"),
            },
            // (storage, offset, size, stride, requires_grad, hooks)
            Global::RebuildTensor => {
                let (Some(Node::Storage { dtype, key, len }), Some(Node::Int(offset))) = (argument(0), argument(1)) else {
                    return self.damaged("a tensor has no storage");
                };
                let (shape, strides) = (self.sizes(argument(2))?, self.sizes(argument(3))?);
                let Ok(offset) = usize::try_from(*offset) else { return self.damaged("a tensor starts before its storage") };
                if shape.len() != strides.len() {
                    return self.damaged("a tensor's shape and strides differ in length");
                }
                Ok(Node::Tensor(Box::new(TensorRef { dtype: *dtype, storage: key.clone(), storage_len: *len, offset, shape, strides })))
            }
            Global::Storage(_) => self.damaged("a storage is made without its data"),
        }
    }

    /// Python 2 wrote `OrderedDict([[key, value], ...])`. The list is taken apart, not copied: a program that makes a thousand dictionaries of one
    /// list gets one full one.
    fn dict_of_list(&mut self, list: Id) -> Result<Node, PickleError> {
        let Some(Node::List(items)) = self.arena.get_mut(list) else { return self.damaged("an ordered dictionary is not made of pairs") };
        let items = std::mem::take(items);
        let pairs = items.iter().map(|item| match self.arena.get(*item) {
            Some(Node::List(pair) | Node::Tuple(pair)) => match pair.as_slice() {
                [key, value] => Ok((*key, *value)),
                _ => self.damaged("an ordered dictionary is not made of pairs"),
            },
            _ => self.damaged("an ordered dictionary is not made of pairs"),
        });
        pairs.collect::<Result<_, _>>().map(Node::Dict)
    }

    fn sizes(&self, node: Option<&Node>) -> Result<Vec<usize>, PickleError> {
        let Some(Node::Tuple(items)) = node else { return self.damaged("a tensor has no shape") };
        if items.len() > MAX_DIMS {
            return self.damaged("a tensor has too many dimensions");
        }
        items
            .iter()
            .map(|id| match self.arena.get(*id) {
                Some(Node::Int(size)) => usize::try_from(*size).or_else(|_| self.damaged("a size is negative")),
                _ => self.damaged("a size is no integer"),
            })
            .collect()
    }

    /// `('storage', storage class, key, device, elements[, view])`.
    fn storage(&self, id: Id) -> Result<Node, PickleError> {
        let Some(Node::Tuple(items)) = self.arena.get(id) else { return self.damaged("a storage is not described by a tuple") };
        let item = |i: usize| items.get(i).and_then(|id| self.arena.get(*id));
        match (item(0), item(1), item(2), item(4), item(5)) {
            (
                Some(Node::Text(kind)),
                Some(Node::Global(Global::Storage(dtype))),
                Some(Node::Text(key)),
                Some(Node::Int(len)),
                None | Some(Node::None),
            ) if kind == "storage" && key.len() <= MAX_KEY_BYTES => match usize::try_from(*len) {
                Ok(len) => Ok(Node::Storage { dtype: *dtype, key: key.clone(), len }),
                Err(_) => self.damaged("a storage has a negative size"),
            },
            _ => self.damaged("a storage is described in a way that this reader does not know"),
        }
    }
}

/// The whitelist.
fn global(module: &str, name: &str) -> Result<Global, PickleError> {
    match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch", class) => Dtype::of_storage(class).map(Global::Storage),
        _ => None,
    }
    .ok_or_else(|| {
        // Names come from the file and go to a terminal: no control characters, and not pages of them.
        let name = format!("{module}.{name}").chars().filter(|c| !c.is_control()).take(120).collect();
        PickleError::Forbidden { name }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What `torch.save({'a': torch.zeros(2, 3)})` writes as data.pkl (PyTorch 2.15), memo opcodes and all.
    const ONE_TENSOR: &[u8] = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08K\x03K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0ds.";

    #[test]
    fn a_state_dictionary_is_read() {
        let pickle = Pickle::read(ONE_TENSOR).unwrap();
        assert_eq!(pickle.length, ONE_TENSOR.len());
        let expected =
            TensorRef { dtype: Dtype::F32, storage: "0".into(), storage_len: 6, offset: 0, shape: vec![2, 3], strides: vec![3, 1] };
        assert_eq!(pickle.tensors(), [("a", &expected)]);
    }

    #[test]
    fn code_is_refused_by_name_and_never_run() {
        // The classic: pickle.loads of this runs a shell command.
        let attack = b"\x80\x02cposix\nsystem\nX\x0a\x00\x00\x00touch evil\x85R.";
        assert_eq!(Pickle::read(attack).unwrap_err(), PickleError::Forbidden { name: "posix.system".into() });
        let stacked = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.";
        assert_eq!(Pickle::read(stacked).unwrap_err(), PickleError::Forbidden { name: "builtins.eval".into() });
        // Names inside allowed modules are no more allowed than others.
        for attack in [&b"ctorch\nload\n."[..], b"ctorch._utils\n_rebuild_tensor\n.", b"ccollections\nnamedtuple\n."] {
            assert!(matches!(Pickle::read(attack), Err(PickleError::Forbidden { .. })));
        }
        // INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1: other ways to make objects.
        for opcode in [b'i', b'o', 0x81, 0x92, 0x82] {
            let bytes = [b'(', b')', b')', opcode, b'.'];
            assert!(matches!(Pickle::read(&bytes), Err(PickleError::Opcode { .. })), "{opcode:#x}");
        }
    }

    #[test]
    fn sizes_that_lie_allocate_nothing_and_fail() {
        // A text of 4 GiB - 1 in 6 bytes.
        assert_eq!(Pickle::read(b"\x80\x02X\xff\xff\xff\xff").unwrap_err(), PickleError::CutOff { at: 7 });
        // A negative shape.
        let at = ONE_TENSOR.windows(2).position(|w| w == b"K\x02").unwrap();
        let mut bytes = ONE_TENSOR.to_vec();
        bytes.splice(at..at + 2, *b"J\xff\xff\xff\xff");
        assert!(matches!(Pickle::read(&bytes), Err(PickleError::Damaged { .. })));
    }

    #[test]
    fn objects_may_refer_to_themselves() {
        // d = {}; d['a'] = d: dropping and searching it must end.
        let pickle = Pickle::read(b"}q\x00X\x05\x00\x00\x00modelh\x00s.").unwrap();
        assert!(pickle.tensors().is_empty());
    }

    #[test]
    fn checkpoints_and_parameters_are_opened() {
        // {'state_dict': {'a': tensor}}
        let mut bytes = b"}X\x0a\x00\x00\x00state_dict".to_vec();
        bytes.extend_from_slice(&ONE_TENSOR[2..ONE_TENSOR.len() - 1]);
        bytes.extend_from_slice(b"s.");
        assert_eq!(Pickle::read(&bytes).unwrap().tensors().len(), 1);
    }

    /// Opcodes that the reader knows, as building material for programs that go deeper than noise does.
    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let fixed: Vec<&'static [u8]> = vec![
            b"(",
            b"}",
            b"]",
            b")",
            b"N",
            b"\x88",
            b"K\x02",
            b"M\x01\x00",
            b"J\xff\xff\xff\xff",
            b"\x8a\x01\x80",
            b"X\x01\x00\x00\x00a",
            b"X\x07\x00\x00\x00storage",
            b"t",
            b"l",
            b"d",
            b"a",
            b"e",
            b"s",
            b"u",
            b"\x85",
            b"\x86",
            b"\x87",
            b"ctorch\nFloatStorage\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch._utils\n_rebuild_parameter\n",
            b"ccollections\nOrderedDict\n",
            b"R",
            b"Q",
            b"b",
            b"q\x00",
            b"h\x00",
            b"q\x01",
            b"h\x01",
            b"\x94",
            b"0",
            b".",
            b"G12345678",
            b"\x80\x02",
        ];
        prop_oneof![8 => prop::sample::select(fixed).prop_map(<[u8]>::to_vec), 1 => prop::collection::vec(any::<u8>(), 0..4)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pickle::read(&bytes).map(|p| p.tensors().len());
        }

        #[test]
        fn random_programs_never_panic_and_stay_small(pieces in prop::collection::vec(piece(), 0..200)) {
            let bytes: Vec<u8> = pieces.concat();
            if let Ok(pickle) = Pickle::read(&bytes) {
                prop_assert!(pickle.arena.len() <= bytes.len());
                let _ = (pickle.tensors().len(), pickle.texts(), pickle.integer());
            }
        }

        #[test]
        fn damage_never_panics(at in 0..ONE_TENSOR.len(), to in any::<u8>(), cut in 0..ONE_TENSOR.len()) {
            let mut bytes = ONE_TENSOR.to_vec();
            bytes[at] = to;
            let _ = Pickle::read(&bytes).map(|p| p.tensors().len());
            prop_assert!(Pickle::read(&ONE_TENSOR[..cut]).is_err(), "cut at {cut}");
        }
    }
}
