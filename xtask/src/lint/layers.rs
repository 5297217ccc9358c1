//! Checks that the imports of a crate only go down: the order of its modules stands in one comment
//! of `lib.rs` or `main.rs`.
//!
//! The comment starts with [`MARK`]. Arrows divide its modules into layers. A module may import
//! modules of later layers, but none of its own layer. A name that the root re-exports counts as
//! an import of the module that has it. No module may import an item that the root itself defines.
//! The files inside of one module may import each other, but not in a circle. Test modules are
//! exempt.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, ensure};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

use crate::workspace;

const CRATES: &[&str] = &[
    "tcp-udp-trace/src/lib.rs",
    "tcp-udp-trace-ebpf/src/main.rs",
    "xtask/src/main.rs",
];

const MARK: &str = "// Layers, each uses only those after it:";

/// The path of a module below the crate; empty for the root.
type Module = Vec<String>;

pub(super) fn check() -> Result<()> {
    let mut faults = Vec::new();
    for root in CRATES {
        let read = |file: &str| fs::read_to_string(workspace::root().join(file)).ok();
        faults.extend(faults_of_crate(root, &read)?);
    }
    ensure!(
        faults.is_empty(),
        "imports that go up or in a circle:\n{}",
        faults.join("\n")
    );
    Ok(())
}

/// `read` returns the text of a file, or `None` if there is no such file.
fn faults_of_crate(root: &str, read: &dyn Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let text = read(root).with_context(|| format!("cannot read {root}"))?;
    let layers = layers(&text).with_context(|| format!("{root}: no comment `{MARK}`"))?;
    let mut files = BTreeMap::new();
    add_file(root, Module::new(), read, &mut files)?;
    Ok([
        faults_of_list(root, &layers, &files),
        faults_of_layers(&layers, &files),
        circles(&files),
    ]
    .concat())
}

/// Returns the position of each module in the list of layers; `None` if the file has no list.
fn layers(text: &str) -> Option<BTreeMap<String, usize>> {
    let mut lines = text.lines().skip_while(|line| !line.starts_with(MARK));
    let first = lines.next()?.trim_start_matches(MARK).to_owned();
    let rest = lines.map_while(|line| line.strip_prefix("// "));
    let list = rest.fold(first, |list, line| list + " " + line);
    let layers = list.trim().trim_end_matches('.').split("->").enumerate();
    let modules = layers.flat_map(|(position, layer)| {
        let names = layer.split(',').map(str::trim);
        names.map(move |name| (name.to_owned(), position))
    });
    Some(modules.collect())
}

/// One file of a crate: its name, and the modules' items that it names.
struct File {
    name: String,
    imports: BTreeSet<Import>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    path: Module,
    /// Its first name may be that of a module in this file, or of another crate.
    is_relative: bool,
}

/// Adds a file and the files of the modules that it declares, except for tests.
fn add_file(
    name: &str,
    module: Module,
    read: &dyn Fn(&str) -> Option<String>,
    files: &mut BTreeMap<Module, File>,
) -> Result<()> {
    let text = read(name).with_context(|| format!("cannot read {name}"))?;
    let tokens: TokenStream = text
        .parse()
        .map_err(|error| anyhow::anyhow!("cannot parse {name}: {error}"))?;
    let mut scan = Scan::default();
    scan.tokens(tokens, &module);
    let (folder, last) = name.rsplit_once('/').unwrap_or(("", name));
    let folder = match last {
        "mod.rs" | "lib.rs" | "main.rs" => folder.to_owned(),
        _ => name.trim_end_matches(".rs").to_owned(),
    };
    for child in scan.children {
        let candidates = [
            format!("{folder}/{child}.rs"),
            format!("{folder}/{child}/mod.rs"),
        ];
        let file = candidates.iter().find(|file| read(file).is_some());
        let file = file.with_context(|| format!("{name}: there is no file of `mod {child}`"))?;
        let module = [&module[..], &[child]].concat();
        add_file(file, module, read, files)?;
    }
    let imports = scan.imports;
    let name = name.to_owned();
    files.insert(module, File { name, imports });
    Ok(())
}

/// Modules that a file declares in files of their own, and paths that it names.
#[derive(Default)]
struct Scan {
    children: Vec<String>,
    imports: BTreeSet<Import>,
}

impl Scan {
    fn tokens(&mut self, tokens: TokenStream, module: &[String]) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            at = self.token(&tokens, at, module);
        }
    }

    /// Takes the token at `at`, and returns the position of the next one to take.
    fn token(&mut self, tokens: &[TokenTree], at: usize, module: &[String]) -> usize {
        if let Some(attribute) = attribute(tokens, at) {
            return if is_test(attribute) {
                end_of_item(tokens, at + 2)
            } else {
                at + 2
            };
        }
        match &tokens[at] {
            TokenTree::Ident(ident) if ident == "mod" => {
                let Some(TokenTree::Ident(name)) = tokens.get(at + 1) else {
                    return at + 1;
                };
                match tokens.get(at + 2) {
                    Some(TokenTree::Group(body)) => {
                        let inner = [module, &[name.to_string()]].concat();
                        self.tokens(body.stream(), &inner);
                    }
                    _ => self.children.push(name.to_string()),
                }
                at + 3
            }
            TokenTree::Ident(_) if is_path_separator(tokens, at + 1) => {
                self.path(tokens, at, Vec::new(), module)
            }
            // `pub(in crate::module)` restricts a name, and imports none.
            TokenTree::Group(group) if !starts_with_in(group) => {
                self.tokens(group.stream(), module);
                at + 1
            }
            _ => at + 1,
        }
    }

    /// Takes the path or the tree of paths at `at`, whose earlier names are `path`.
    fn path(
        &mut self,
        tokens: &[TokenTree],
        mut at: usize,
        mut path: Vec<String>,
        module: &[String],
    ) -> usize {
        while let Some(TokenTree::Ident(ident)) = tokens.get(at) {
            path.push(ident.to_string());
            at += 1;
            if !is_path_separator(tokens, at) {
                break;
            }
            at += 2;
        }
        match tokens.get(at) {
            Some(TokenTree::Group(group))
                if group.delimiter() == Delimiter::Brace
                    && is_path_separator_before(tokens, at) =>
            {
                let inner: Vec<_> = group.stream().into_iter().collect();
                let pieces = inner.split(|token| is_punct(Some(token), ','));
                // After the last comma there may be none.
                for piece in pieces.filter(|piece| !piece.is_empty()) {
                    self.path(piece, 0, path.clone(), module);
                }
                return at + 1;
            }
            // Macros are not items of modules.
            Some(token) if is_punct(Some(token), '!') => {}
            _ => self.imports.extend(import(&path, module)),
        }
        at
    }
}

/// Returns the import that a path means inside of `module`.
fn import(path: &[String], module: &[String]) -> Option<Import> {
    let mut base = match path.first()?.as_str() {
        "crate" => Module::new(),
        "self" | "super" => module.to_owned(),
        _ => {
            return Some(Import {
                path: [module, path].concat(),
                is_relative: true,
            });
        }
    };
    for name in path {
        match name.as_str() {
            "crate" | "self" => {}
            "super" => drop(base.pop()),
            _ => base.push(name.clone()),
        }
    }
    Some(Import {
        path: base,
        is_relative: false,
    })
}

fn attribute(tokens: &[TokenTree], at: usize) -> Option<&Group> {
    match (&tokens[at], tokens.get(at + 1)?) {
        (TokenTree::Punct(hash), TokenTree::Group(group)) if hash.as_char() == '#' => Some(group),
        _ => None,
    }
}

fn is_test(attribute: &Group) -> bool {
    let text = attribute.stream().to_string().replace(' ', "");
    text == "cfg(test)" || text.starts_with("cfg(all(test,")
}

/// Returns the position after the item: after its semicolon or its body.
fn end_of_item(tokens: &[TokenTree], at: usize) -> usize {
    let length = tokens[at..].iter().position(|token| match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        token => is_punct(Some(token), ';'),
    });
    length.map_or(tokens.len(), |length| at + length + 1)
}

fn starts_with_in(group: &Group) -> bool {
    let first = group.stream().into_iter().next();
    matches!(first, Some(TokenTree::Ident(ident)) if ident == "in")
}

fn is_path_separator(tokens: &[TokenTree], at: usize) -> bool {
    is_punct(tokens.get(at), ':') && is_punct(tokens.get(at + 1), ':')
}

fn is_path_separator_before(tokens: &[TokenTree], at: usize) -> bool {
    at >= 2 && is_path_separator(tokens, at - 2)
}

fn is_punct(token: Option<&TokenTree>, expected: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == expected)
}

/// Compares the list with the modules of the root.
fn faults_of_list(
    root: &str,
    layers: &BTreeMap<String, usize>,
    files: &BTreeMap<Module, File>,
) -> Vec<String> {
    let modules: BTreeSet<_> = files.keys().filter(|module| module.len() == 1).collect();
    let unlisted = modules
        .iter()
        .filter(|module| !layers.contains_key(&module[0]))
        .map(|module| format!("{root}: `{}` is not in the list of layers", module[0]));
    let unknown = layers
        .keys()
        .filter(|name| !modules.contains(&vec![(*name).clone()]))
        .map(|name| format!("{root}: the list of layers has `{name}`, which is no module"));
    unlisted.chain(unknown).collect()
}

/// Returns the imports that leave their module and do not go down.
fn faults_of_layers(
    layers: &BTreeMap<String, usize>,
    files: &BTreeMap<Module, File>,
) -> Vec<String> {
    let mut faults = Vec::new();
    for (module, file) in files.iter().filter(|(module, _)| !module.is_empty()) {
        for import in &file.imports {
            let Some(target) = target(module, import, files) else {
                continue;
            };
            let name = import.path.join("::");
            match target.first() {
                None => faults.push(format!(
                    "{}: `{name}` is defined in the crate's root, which is above all modules",
                    file.name
                )),
                Some(other)
                    if *other != module[0] && layers.get(&module[0]) >= layers.get(other) =>
                {
                    faults.push(format!(
                        "{}: `{name}`: `{other}` is not below `{}`",
                        file.name, module[0]
                    ));
                }
                Some(_) => {}
            }
        }
    }
    faults
}

/// Returns the module with a file of its own that `import` names, or an item of which it names.
fn target<'a>(
    module: &[String],
    import: &'a Import,
    files: &'a BTreeMap<Module, File>,
) -> Option<&'a [String]> {
    let length = (0..=import.path.len())
        .rev()
        .find(|&length| files.contains_key(&import.path[..length]))?;
    match length {
        0 if !module.is_empty() && !import.is_relative => {
            let root = &files[&Module::new()];
            let mut re_exports = root.imports.iter();
            let re_export = re_exports.find(|import_there| {
                import_there.path.len() > 1 && import_there.path.last() == import.path.first()
            });
            re_export.map_or(Some(&[]), |re_export| target(&[], re_export, files))
        }
        _ if import.is_relative && length <= module.len() => None,
        _ => Some(&import.path[..length]),
    }
}

/// Returns the circles of files that import each other, each once.
fn circles(files: &BTreeMap<Module, File>) -> Vec<String> {
    let imported = |module: &Module| -> BTreeSet<Module> {
        files[module]
            .imports
            .iter()
            .filter_map(|import| target(module, import, files))
            .filter(|target| !target.is_empty() && target != module)
            .map(<[_]>::to_vec)
            .collect()
    };
    let reached: BTreeMap<&Module, BTreeSet<Module>> = files
        .keys()
        .map(|module| {
            let mut reached = BTreeSet::new();
            let mut next: Vec<_> = imported(module).into_iter().collect();
            while let Some(module) = next.pop() {
                if reached.insert(module.clone()) {
                    next.extend(imported(&module));
                }
            }
            (module, reached)
        })
        .collect();
    let circles: BTreeSet<Vec<&str>> = reached
        .iter()
        .filter(|(module, reached_here)| reached_here.contains(**module))
        .map(|(module, reached_here)| {
            let members = reached_here
                .iter()
                .filter(|other| reached[other].contains(*module));
            members.map(|other| &*files[other].name).collect()
        })
        .collect();
    circles
        .iter()
        .map(|members| format!("import each other: {}", members.join(", ")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "// Layers, each uses only those after it: top,\n// side -> middle -> ground.\n\
                        mod top; mod side; mod middle; mod ground;";

    fn faults(files: &[(&str, &str)]) -> Vec<String> {
        let read = |name: &str| {
            let named = files.iter().find(|(file, _)| *file == name);
            named.map(|(_, text)| (*text).to_owned())
        };
        faults_of_crate("src/lib.rs", &read).unwrap()
    }

    fn with_ground(ground: &str) -> Vec<String> {
        faults(&[
            ("src/lib.rs", ROOT),
            ("src/top.rs", "use crate::{middle::{self, A,}, ground,};"),
            ("src/side.rs", ""),
            ("src/middle.rs", "use super::ground::B;"),
            ("src/ground.rs", ground),
        ])
    }

    #[test]
    fn down_is_allowed() {
        assert!(with_ground("use std::fmt; pub(crate) struct B;").is_empty());
    }

    #[test]
    fn up_is_not_in_any_form() {
        for up in [
            "use crate::middle::A;",
            "use crate::{middle::{A}};",
            "use super::middle;",
            "fn f() { vec![crate::middle::A] }",
            "mod inner { use super::super::middle::A; }",
            "#[cfg(unix)] use crate::middle::A;",
        ] {
            assert_eq!(with_ground(up).len(), 2, "{up}");
        }
    }

    #[test]
    fn tests_comments_and_strings_are_exempt() {
        for text in [
            "#[cfg(test)] mod tests { use crate::middle::A; }",
            "#[cfg(test)]\n#[allow(x)]\nuse crate::middle::A;",
            "#[cfg(test)] mod tests;",
            "/// [`crate::middle::A`]\nstruct A;",
            "const A: &str = \"crate::middle::A\";",
            "pub(in crate::ground) struct A;",
            "fn f() { crate::log!() }",
        ] {
            assert_eq!(with_ground(text), [""; 0], "{text}");
        }
    }

    #[test]
    fn a_name_of_the_root_is_one_of_the_module_that_has_it() {
        let faults_of = |root: &str| {
            let root = format!("{ROOT} pub use middle::{{A, Error}}; {root}");
            faults(&[
                ("src/lib.rs", &root),
                ("src/top.rs", "use crate::Error;"),
                ("src/side.rs", "use super::Defined;"),
                ("src/middle.rs", ""),
                ("src/ground.rs", "use crate::A;"),
            ])
        };
        assert_eq!(
            faults_of("pub struct Defined;"),
            [
                "src/ground.rs: `A`: `middle` is not below `ground`",
                "src/side.rs: `Defined` is defined in the crate's root, which is above all modules",
            ]
        );
    }

    #[test]
    fn modules_of_one_layer_do_not_import_each_other() {
        let files = [
            (
                "src/lib.rs",
                "// Layers, each uses only those after it: a, b.\nmod a; mod b;",
            ),
            ("src/a.rs", "use crate::b::B;"),
            ("src/b.rs", ""),
        ];
        assert_eq!(faults(&files), ["src/a.rs: `b::B`: `b` is not below `a`"]);
    }

    #[test]
    fn the_list_is_complete() {
        let files = [
            (
                "src/lib.rs",
                "// Layers, each uses only those after it: a.\nmod b;",
            ),
            ("src/b.rs", ""),
        ];
        assert_eq!(faults(&files).len(), 2);
    }

    #[test]
    fn a_circle_inside_of_a_module_is_found_once() {
        let files = [
            (
                "src/lib.rs",
                "// Layers, each uses only those after it: a.\nmod a;",
            ),
            ("src/a/mod.rs", "mod b; mod c; use b::B;"),
            ("src/a/b.rs", "use super::c::C;"),
            ("src/a/c.rs", "mod d; use self::d::D;"),
            ("src/a/c/d.rs", "use crate::a::b::B;"),
        ];
        assert_eq!(
            faults(&files),
            ["import each other: src/a/b.rs, src/a/c.rs, src/a/c/d.rs"]
        );
    }
}
