# Zig (pip install ziglang) as the compiler for another system: clang, with the headers and the C++ library of that system. It serves Windows
# and macOS alike, and its DLL needs no other. Presets name the system and the processor.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES CMAKE_SYSTEM_NAME CMAKE_SYSTEM_PROCESSOR)
execute_process(COMMAND python3 -c "import ziglang; print(*ziglang.__path__)" OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_program(ZIG zig PATHS ${package})
if(NOT ZIG)
  message(FATAL_ERROR "carafepp: this build needs zig on the PATH or in python3. Install it: pip install ziglang")
endif()
set(target_Windows windows-gnu)
set(target_Darwin macos)
string(REPLACE arm64 aarch64 target ${CMAKE_SYSTEM_PROCESSOR}-${target_${CMAKE_SYSTEM_NAME}})
# CMake calls each tool by one name. Without -O2 its checks of the compiler would make zig build the C library once more, not optimised.
function(tool variable words)
  set(path ${CMAKE_BINARY_DIR}/zig/${variable})
  file(WRITE ${path} "#!/bin/sh\nexec '${ZIG}' ${words} \"$@\"\n")
  file(CHMOD ${path} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
  set(${variable} ${path} CACHE FILEPATH "")
endfunction()
tool(CMAKE_C_COMPILER "cc -target ${target} -O2")
tool(CMAKE_CXX_COMPILER "c++ -target ${target} -O2")
tool(CMAKE_AR ar)
tool(CMAKE_RANLIB ranlib)

# Windows programs run in Wine, with an empty configuration and no display.
find_program(WINE wine64 PATHS /usr/lib/wine)
if(CMAKE_SYSTEM_NAME STREQUAL "Windows" AND WINE)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${CMAKE_COMMAND} -E env --unset=DISPLAY --unset=WAYLAND_DISPLAY WINEPREFIX=${CMAKE_BINARY_DIR}/wine
    WINEDEBUG=-all WINEDLLOVERRIDES=mscoree,mshtml= ${WINE})
endif()
