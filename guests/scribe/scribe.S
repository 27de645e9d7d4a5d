# The scribe: a guest that is one boot sector and a few behind it, so that it is up at once even where it is emulated.
# It writes numbered records to the disk that it was booted from, says on its console which of them its disk has, and
# after each boot whether all that it finds is what it wrote last:
#
#   SCRIBE-HAS N        all records up to N are there, none is damaged and none is older than it may be
#   SCRIBE-BAD S F E    slot S holds record F (or a damaged one), and not E
#   SCRIBE-WROTE N      its disk has said that record N is written
#   SCRIBE-FAILED N     its disk has refused it; it tries again
#
# Record N fills the sector of slot N mod 1024, from 1 MiB of the disk on; its 32-bit word I is N xor (I * 0x01000193).
# One request is under way at a time, and its BIOS knows no cache: what is written is flushed.

.code16
.intel_syntax noprefix
.globl _start

.set FIRST, 2048            # The sector of slot 0.
.set SLOTS, 1024
.set AT_ONCE, 64            # Sectors that are read at once: 32 KiB.
.set FACTOR, 0x01000193
.set READ, 0x2000           # Segments of what is read and of what is written.
.set WRITE, 0x3000
.set COM1, 0x3f8
.set PM1, 0x600             # ACPI's fixed registers of a q35 machine: status, enable, control.
.set BUTTON, 0x100
.set OFF, 0x2000

_start:
    ljmp 0, offset begin
begin:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    sti
    mov [drive], dl
    mov word ptr [packet + 2], (end - more + 511) / 512
    mov word ptr [packet + 4], offset more
    mov word ptr [packet + 6], 0
    mov dword ptr [packet + 8], 1
    mov ah, 0x42
    call disk
    jnc main
    hlt
    jmp $ - 1

# Carries the packet out: AH is what to do. Carry when it failed.
disk:
    xor al, al
    mov si, offset packet
    mov dl, [drive]
    int 0x13
    ret

packet:
    .word 16, 0, 0, 0
    .quad 0
drive:
    .byte 0

.org 510
.word 0xaa55
more:

main:
    mov dx, PM1 + 2
    mov ax, BUTTON
    out dx, ax
    mov dword ptr [largest], 0
    mov byte ptr [pass], 0
    call look
    mov byte ptr [pass], 1
    call look
    cmp byte ptr [bad], 0
    jne stands
    mov si, offset has
    call words
    mov eax, [largest]
    call number
    call line
next:
    mov eax, [largest]
    inc eax
    mov [largest], eax
    call record
    call rest
    jmp next

# It says no more, so that its disk stays as it was found.
stands:
    call rest
    jmp stands

# Reads all slots. In the first pass it finds the largest record, in the second it compares all with it.
look:
    mov word ptr [slot], 0
chunk:
    mov word ptr [packet + 2], AT_ONCE
    mov word ptr [packet + 4], 0
    mov word ptr [packet + 6], READ
    movzx eax, word ptr [slot]
    add eax, FIRST
    mov [packet + 8], eax
    mov ah, 0x42
    call disk
    jc chunk
    mov ax, READ
    mov es, ax
    xor di, di
sector:
    call one
    inc word ptr [slot]
    add di, 512
    cmp di, AT_ONCE * 512
    jne sector
    cmp word ptr [slot], SLOTS
    jne chunk
    ret

# Looks at the sector at ES:DI, which is that of [slot].
one:
    mov eax, es:[di]
    cmp byte ptr [pass], 0
    jne against
    cmp eax, [largest]
    jbe damaged
    mov [largest], eax
# All its words must be those of its number, or zero when it has none.
damaged:
    mov ebx, eax
    xor edx, edx
    xor cx, cx
    mov si, di
each:
    mov ebx, eax
    xor ebx, edx
    test eax, eax
    jnz filled
    xor ebx, ebx
filled:
    cmp ebx, es:[si]
    jne wrong
    add edx, FACTOR
    add si, 4
    inc cx
    cmp cx, 128
    jne each
    ret
# The newest record of this slot that is not larger than the largest one, or none.
against:
    mov ebx, [largest]
    movzx edx, word ptr [slot]
    sub ebx, edx
    and ebx, SLOTS - 1
    mov ecx, [largest]
    sub ecx, ebx
    jg compare
    xor ecx, ecx
compare:
    mov ebx, ecx
    cmp eax, ebx
    jne told
    ret
wrong:
    mov ebx, eax
told:
    mov byte ptr [bad], 1
    push eax
    push ebx
    mov si, offset says_bad
    call words
    movzx eax, word ptr [slot]
    call number
    mov al, ' '
    call letter
    pop ebx
    pop eax
    push ebx
    call number
    mov al, ' '
    call letter
    pop eax
    call number
    call line
    ret

# Writes record EAX, until its disk has it.
record:
    mov bx, WRITE
    mov es, bx
    xor di, di
    xor edx, edx
fill:
    mov ebx, eax
    xor ebx, edx
    mov es:[di], ebx
    add edx, FACTOR
    add di, 4
    cmp di, 512
    jne fill
again:
    mov word ptr [packet + 2], 1
    mov word ptr [packet + 4], 0
    mov word ptr [packet + 6], WRITE
    mov eax, [largest]
    and eax, SLOTS - 1
    add eax, FIRST
    mov [packet + 8], eax
    mov ah, 0x43
    call disk
    mov si, offset wrote
    jnc written
    mov si, offset failed
written:
    pushf
    call words
    mov eax, [largest]
    call number
    call line
    popf
    jnc done
    call rest
    jmp again
done:
    ret

# Until the clock ticks, 18 times a second. Ends when the power button was pressed.
rest:
    mov eax, [0x46c]
ticks:
    hlt
    cmp eax, [0x46c]
    je ticks
    mov dx, PM1
    in ax, dx
    test ax, BUTTON
    jz on
    mov dx, PM1 + 4
    mov ax, OFF
    out dx, ax
on:
    ret

# Says the words at SI.
words:
    lodsb
    test al, al
    jz said
    call letter
    jmp words
said:
    ret

line:
    mov al, 13
    call letter
    mov al, 10

# Says the letter in AL.
letter:
    push dx
    push ax
    mov dx, COM1 + 5
busy:
    in al, dx
    test al, 0x20
    jz busy
    pop ax
    mov dx, COM1
    out dx, al
    pop dx
    ret

# Says EAX in decimal.
number:
    mov ebx, 10
    xor cx, cx
digit:
    xor edx, edx
    div ebx
    push dx
    inc cx
    test eax, eax
    jnz digit
digits:
    pop ax
    add al, '0'
    call letter
    loop digits
    ret

has: .asciz "SCRIBE-HAS "
says_bad: .asciz "SCRIBE-BAD "
wrote: .asciz "SCRIBE-WROTE "
failed: .asciz "SCRIBE-FAILED "
largest: .long 0
slot: .word 0
pass: .byte 0
bad: .byte 0
end:
