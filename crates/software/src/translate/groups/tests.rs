use super::*;
use crate::translate::guest_code;

/// The plan of some instructions, in the middle of a page.
fn plan_of(instructions: &[&[u8]]) -> Plan {
    let mut plan = Plan::default();
    plan.make(&guest_code::decode(&instructions.concat(), 0x40_0100, 0, guest_code::ITEMS_MAX), None);
    plan
}

/// For each item: the group of its operand or stack access, and the place in it.
fn shares(plan: &Plan) -> Vec<Option<(usize, i32)>> {
    let either = |shares: &[Option<Share>; 2]| shares[0].or(shares[1]);
    plan.shares.iter().map(|shares| either(shares).map(|share| (share.group, share.offset))).collect()
}

#[test]
fn fields_of_an_object_share_the_look_up_of_the_first() {
    let plan = plan_of(&[
        // mov eax, [rdi + 16]
        &[0x8b, 0x47, 0x10],
        // mov edx, [rdi]
        &[0x8b, 0x17],
        // add rdi, 8
        &[0x48, 0x83, 0xc7, 0x08],
        // mov ecx, [rdi + 4]
        &[0x8b, 0x4f, 0x04],
        // ret
        &[0xc3],
    ]);
    assert_eq!(shares(&plan)[..4], [Some((0, 16)), Some((0, 0)), None, Some((0, 12))]);
    let Group { lead, len, .. } = plan.groups[0];
    assert_eq!((lead, len), (-16, 20));
    assert!(plan.share(0, Access::Operand).unwrap().is_head && !plan.share(1, Access::Operand).unwrap().is_head);
}

#[test]
fn a_register_that_changes_or_is_read_from_memory_begins_another_group() {
    let plan = plan_of(&[
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // mov rdi, [rdi + 8]
        &[0x48, 0x8b, 0x7f, 0x08],
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // mov edi, edi
        &[0x89, 0xff],
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // ret
        &[0xc3],
    ]);
    assert_eq!(shares(&plan)[..5], [Some((0, 0)), Some((0, 8)), None, None, None]);
}

#[test]
fn a_store_does_not_join_a_group_that_is_only_read() {
    let plan = plan_of(&[
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // mov [rdi + 8], rax
        &[0x48, 0x89, 0x47, 0x08],
        // mov rax, [rdi + 16]
        &[0x48, 0x8b, 0x47, 0x10],
        // ret
        &[0xc3],
    ]);
    assert_eq!(shares(&plan)[..3], [None, Some((0, 0)), Some((0, 8))]);
}

#[test]
fn pushes_and_pops_and_the_frame_are_one_group() {
    let plan = plan_of(&[
        // push rbp
        &[0x55],
        // mov rbp, rsp
        &[0x48, 0x89, 0xe5],
        // push rbx
        &[0x53],
        // mov [rbp - 24], rax
        &[0x48, 0x89, 0x45, 0xe8],
        // pop rbx
        &[0x5b],
        // leave
        &[0xc9],
        // ret
        &[0xc3],
    ]);
    let expected = [Some((0, 24)), None, Some((0, 16)), Some((0, 0)), Some((0, 16)), Some((0, 24)), Some((0, 32))];
    assert_eq!(shares(&plan), expected);
}

#[test]
fn ways_that_meet_keep_what_both_know() {
    let plan = plan_of(&[
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // test rax, rax
        &[0x48, 0x85, 0xc0],
        // je end
        &[0x74, 0x06],
        // mov rcx, [rsi]
        &[0x48, 0x8b, 0x0e],
        // mov rsi, rdi
        &[0x48, 0x89, 0xfe],
        // mov rax, [rdi + 8]
        &[0x48, 0x8b, 0x47, 0x08],
        // mov rcx, [rsi]
        &[0x48, 0x8b, 0x0e],
        // ret
        &[0xc3],
    ]);
    let shares = shares(&plan);
    assert_eq!((shares[0], shares[5]), (Some((0, 0)), Some((0, 8))));
    // RSI holds one value or another, and its first access is on one way only.
    assert_eq!((shares[3], shares[6]), (None, None));
}

#[test]
fn a_head_on_one_way_is_no_head_for_what_both_ways_reach() {
    let plan = plan_of(&[
        // test rax, rax
        &[0x48, 0x85, 0xc0],
        // je end
        &[0x74, 0x03],
        // mov rcx, [rdi]
        &[0x48, 0x8b, 0x0f],
        // mov rax, [rdi + 8]
        &[0x48, 0x8b, 0x47, 0x08],
        // ret
        &[0xc3],
    ]);
    assert!(plan.groups.is_empty());
}

#[test]
fn a_loop_begins_anew_at_its_head() {
    let plan = plan_of(&[
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // mov rax, [rdi + 8]
        &[0x48, 0x8b, 0x47, 0x08],
        // add rdi, 8
        &[0x48, 0x83, 0xc7, 0x08],
        // jne again
        &[0x75, 0xf6],
        // ret
        &[0xc3],
    ]);
    assert!(plan.groups.is_empty());
}

#[test]
fn what_may_end_a_translation_ends_groups() {
    for ends in [true, false] {
        let plan = plan_of(&[
            // mov rax, [rdi]
            &[0x48, 0x8b, 0x07],
            // invlpg [rsi], or nop dword [rax]
            if ends { &[0x0f, 0x01, 0x3e] } else { &[0x0f, 0x1f, 0x00] },
            // mov rax, [rdi + 8]
            &[0x48, 0x8b, 0x47, 0x08],
            // ret
            &[0xc3],
        ]);
        assert_eq!(plan.groups.is_empty(), ends);
    }
}

#[test]
fn a_stretch_has_a_greatest_length() {
    let plan = plan_of(&[
        // mov rax, [rdi]
        &[0x48, 0x8b, 0x07],
        // mov rax, [rdi + 256]
        &[0x48, 0x8b, 0x87, 0x00, 0x01, 0x00, 0x00],
        // mov rax, [rdi + 264]
        &[0x48, 0x8b, 0x87, 0x08, 0x01, 0x00, 0x00],
        // ret
        &[0xc3],
    ]);
    assert_eq!(shares(&plan)[..3], [None, Some((0, 0)), Some((0, 8))]);
}

#[test]
fn a_relative_and_an_absolute_address_share_nothing() {
    // The unit's copy at another address has another distance between them.
    let plan = plan_of(&[
        // mov eax, [rip + 0x100]
        &[0x8b, 0x05, 0, 1, 0, 0],
        // mov eax, [0x400208]
        &[0x8b, 0x04, 0x25, 0x08, 0x02, 0x40, 0],
        // mov eax, gs:[rip + 0x100]
        &[0x65, 0x8b, 0x05, 0, 1, 0, 0],
        // mov eax, gs:[0x400218]
        &[0x65, 0x8b, 0x04, 0x25, 0x18, 0x02, 0x40, 0],
        // ret
        &[0xc3],
    ]);
    assert_eq!(shares(&plan), [None; 5]);
}
