// Lets the library run on the systems that torch's wheels run on: glibc 2.28, where it would ask for 2.32.
//
// Headers of libstdc++ leave out atomic instructions while a process has one thread, which glibc tells from 2.32 on, in
// this variable. Linked against our own, which always says that there are more, the library asks for nothing so new.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
