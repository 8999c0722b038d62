//! Trees beside a plain map that does the same.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::name::Namer;

#[derive(Default)]
struct Nodes(BTreeMap<Name, Arc<TreeNode>>);

impl NodeSource for Nodes {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>> {
        self.0.get(name).cloned().ok_or(StoreError::Missing { name: *name })
    }
}

impl NodeSink for Nodes {
    fn put_node(&mut self, bytes: &[u8]) -> Result<Name> {
        let name = Namer::open().name(Kind::Tree, bytes);
        self.0.insert(name, Arc::new(TreeNode::from_bytes(bytes, 0).unwrap()));
        Ok(name)
    }
}

use crate::name::Kind;

type Content = BTreeMap<u64, Name>;

fn content(nodes: &Nodes, root: Root) -> Content {
    let mut content = Content::new();
    walk(nodes, root, &mut |visit| {
        if let Visit::Chunk(chunk, name) = visit {
            content.insert(chunk, name);
        }
        Ok(true)
    })
    .unwrap();
    content
}

fn chunk_name(value: u8) -> Name {
    if value == 0 { Name::NONE } else { Namer::open().name(Kind::Data, &[value]) }
}

fn build(nodes: &mut Nodes, chunks: u64, content: &Content) -> Root {
    let changes: Vec<_> = content.iter().map(|(&chunk, &name)| (chunk, name)).collect();
    update(nodes, Root::empty(chunks), &changes).unwrap()
}

fn changes() -> impl Strategy<Value = BTreeMap<u64, u8>> {
    let chunk = prop_oneof![0..300u64, 16_000..17_000u64, 0..3_000_000u64];
    prop::collection::btree_map(chunk, 0..4u8, 0..40)
}

proptest! {
    #[test]
    fn a_tree_holds_what_was_put_and_equal_content_has_an_equal_root(rounds in prop::collection::vec(changes(), 1..5)) {
        const CHUNKS: u64 = 3_000_000;
        let mut nodes = Nodes::default();
        let mut root = Root::empty(CHUNKS);
        let mut expected = Content::new();
        for round in rounds {
            let changes: Vec<_> = round.iter().map(|(&chunk, &value)| (chunk, chunk_name(value))).collect();
            let before = (root, expected.clone());
            root = update(&mut nodes, root, &changes).unwrap();
            for (chunk, name) in changes {
                match name.is_none() {
                    true => expected.remove(&chunk),
                    false => expected.insert(chunk, name),
                };
            }
            prop_assert_eq!(&content(&nodes, root), &expected);
            prop_assert_eq!(build(&mut nodes, CHUNKS, &expected), root);
            let mut differing = Vec::new();
            differences(&nodes, [before.0, root], 0..CHUNKS, &mut |chunk, names| {
                differing.push((chunk, names));
                Ok(())
            }).unwrap();
            let mut chunks: Vec<u64> = before.1.keys().chain(expected.keys()).copied().collect();
            chunks.sort_unstable();
            chunks.dedup();
            let get = |content: &Content, chunk| content.get(&chunk).copied().unwrap_or(Name::NONE);
            let by_hand: Vec<_> = chunks
                .into_iter()
                .map(|chunk| (chunk, [get(&before.1, chunk), get(&expected, chunk)]))
                .filter(|(_, names)| names[0] != names[1])
                .collect();
            prop_assert_eq!(differing, by_hand);
        }
    }

    #[test]
    fn a_cleared_range_is_gone(values in changes(), start in 0..3_000_000u64, len in 0..3_000_000u64) {
        let mut nodes = Nodes::default();
        let mut expected: Content = values.into_iter().map(|(chunk, value)| (chunk, chunk_name(value | 1))).collect();
        let root = build(&mut nodes, 3_000_000, &expected);
        let cleared = clear(&mut nodes, root, start..start + len).unwrap();
        expected.retain(|chunk, _| !(start..start + len).contains(chunk));
        prop_assert_eq!(cleared, build(&mut nodes, 3_000_000, &expected));
    }

    #[test]
    fn a_resized_tree_is_the_tree_of_what_is_left(
        values in changes(),
        before in prop_oneof![1..400u64, 2_900_000..3_100_000u64],
        after in prop_oneof![1..400u64, 16_000..17_000u64, 2_900_000..3_100_000u64],
    ) {
        let mut nodes = Nodes::default();
        let mut expected: Content = values
            .into_iter()
            .filter(|&(chunk, value)| chunk < before && value != 0)
            .map(|(chunk, value)| (chunk, chunk_name(value)))
            .collect();
        let root = build(&mut nodes, before, &expected);
        let other = resize(&mut nodes, root, after).unwrap();
        let mut lost = Content::new();
        differences(&nodes, [root, other], 0..u64::MAX, &mut |chunk, names| {
            lost.insert(chunk, names[0]);
            Ok(())
        }).unwrap();
        prop_assert_eq!(lost, expected.split_off(&after));
        prop_assert_eq!(other, build(&mut nodes, after, &expected));
    }
}

#[test]
fn a_chunk_is_found_in_its_leaf() {
    let mut nodes = Nodes::default();
    let root = update(&mut nodes, Root::empty(1 << 21), &[(5, chunk_name(1)), (1_000_000, chunk_name(2))]).unwrap();
    assert_eq!(root.levels, 3);
    let find = |chunk| find_leaf(&nodes, root, chunk).unwrap().map(|leaf| leaf.children[chunk as usize % FAN_OUT]);
    assert_eq!(find(5), Some(chunk_name(1)));
    assert_eq!(find(6), Some(Name::NONE));
    assert_eq!(find(1_000_000), Some(chunk_name(2)));
    assert_eq!(find(500_000), None);
    assert_eq!(find(u64::MAX), None);
}

#[test]
fn levels_follow_from_the_size() {
    for (chunks, expected) in
        [(0, 1), (1, 1), (128, 1), (129, 2), (1 << 14, 2), ((1 << 14) + 1, 3), (1 << 21, 3), (u64::MAX, 8)]
    {
        assert_eq!(levels(chunks), expected, "{chunks}");
    }
}

#[test]
fn a_root_of_a_file_has_possible_levels() {
    let root = Root { name: chunk_name(1), levels: 3 };
    assert_eq!(Root::from_bytes(&root.to_bytes()), Some(root));
    for levels in [0, 9, 255] {
        assert_eq!(Root::from_bytes(&Root { levels, ..root }.to_bytes()), None);
    }
    assert_eq!(Root::from_bytes(&[1; 32]), None);
}
